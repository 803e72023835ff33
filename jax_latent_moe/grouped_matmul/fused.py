"""Activations that a kernel can fuse into a product, and when it should."""

import dataclasses

from jax_latent_moe import checks

# In the order by which the compiled kernels know them (custom_calls/src/instance.h).
ACTIVATIONS = ("relu2", "gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh", "situ_glu")

# Which activations are fused unless asked otherwise, by contraction: "fwd" fuses the activation, "dgrad" its
# gradient. Whole layers gained time with them; with the others they lost some, or were not timed
# (benchmarks/results/profiles).
FASTER = {
    "cutlass": {
        "fwd": ("relu2", "gelu", "swiglu", "geglu", "geglu_tanh", "situ_glu"),
        "dgrad": ("relu2", "gelu", "swiglu", "geglu", "geglu_tanh"),
    },
    "pallas": {"fwd": ("relu2",), "dgrad": ()},
}


def fusing_refusal(backend: str, fuse: str, contraction: str, activation: str) -> str | None:
    """None, or why a backend leaves an activation that its kernels may fuse to XLA; `fuse` is the config's setting."""
    if fuse == "always" or (fuse == "measured" and activation in FASTER[backend][contraction]):
        return None
    return f"fuse={fuse!r} leaves {activation} of {contraction} to XLA: fuse='always' has the kernel take it."


@dataclasses.dataclass(frozen=True)
class FusedActivation:
    """An elementwise activation that a kernel applies to what it has accumulated.

    Attributes:
        name: one of ACTIVATIONS; those that end in "glu" or "glu_tanh" are gated.
        beta: situ_glu's bound of the gate; 0 otherwise.
        linear_beta: situ_glu's bound of the up half, 0 for none.

    Raises:
        ConfigError: no kernel knows the name.
    """

    name: str
    beta: float = 0.0
    linear_beta: float = 0.0

    def __post_init__(self):
        checks.one_of("FusedActivation.name", self.name, ACTIVATIONS)

    @property
    def gated(self) -> bool:
        """Whether the pre-activation holds a gate half and an up half."""
        return self.name.endswith(("glu", "glu_tanh"))

    @property
    def keeps_hidden(self) -> bool:
        """Whether its gradient is made of hidden rows h rather than of pre-activations: relu2's slope is 2 sqrt(h)."""
        return self.name == "relu2"
