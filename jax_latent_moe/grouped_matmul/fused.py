"""Activations that a kernel can fuse into a product."""

import dataclasses

# In the order by which the compiled kernels know them (custom_calls/src/instance.h).
ACTIVATIONS = ("relu2", "gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh", "situ_glu")


@dataclasses.dataclass(frozen=True)
class FusedActivation:
    """An elementwise activation that a kernel applies to what it has accumulated.

    Attributes:
        name: one of ACTIVATIONS; those that end in "glu" or "glu_tanh" are gated.
        beta: situ_glu's bound of the gate; 0 otherwise.
        linear_beta: situ_glu's bound of the up half, 0 for none.
    """

    name: str
    beta: float = 0.0
    linear_beta: float = 0.0

    @property
    def gated(self) -> bool:
        """Whether the pre-activation holds a gate half and an up half."""
        return self.name.endswith(("glu", "glu_tanh"))
