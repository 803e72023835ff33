"""The products of one block of experts, decided before any runs: what runs each, and what the forward pass keeps.

Forward and backward pass read the same plan, so what one keeps is what the other differentiates.
"""

import dataclasses
from collections.abc import Callable

from jax_latent_moe.activations import BoundActivation, Residual
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.device import Device, current_device
from jax_latent_moe.grouped_matmul.problem import Contraction, Epilogue, Operand, problem
from jax_latent_moe.grouped_matmul.registry import Bound, fused, select

PORTABLE: tuple[Residual, ...] = ("hidden", "pre")
"""Residuals that XLA makes, and differentiates, where no kernel does."""


@dataclasses.dataclass(frozen=True)
class ExpertPlan:
    """Six products and a residual. A product whose problem has no epilogue has its activation composed by XLA.

    Attributes:
        activation: of the experts.
        residual: what the forward pass keeps for the gradient.
        up: the first product where a gradient follows, fwd.
        up_without_gradient: the first product where none follows.
        down: the second product, fwd.
        down_dgrad: the gradient of the hidden rows, and of the pre-activation where it is fused.
        down_wgrad: the gradient of w_out; None where w_out is frozen codes.
        up_dgrad: the gradient of the rows.
        up_wgrad: the gradient of w_in; None where w_in is frozen codes.
    """

    activation: BoundActivation
    residual: Residual
    up: Bound
    up_without_gradient: Bound
    down: Bound
    down_dgrad: Bound
    down_wgrad: Bound | None
    up_dgrad: Bound
    up_wgrad: Bound | None

    def __str__(self) -> str:
        lines = [f"experts with {self.activation}; the forward pass keeps {self.residual!r}"]
        for field in dataclasses.fields(self)[2:]:
            bound = getattr(self, field.name)
            if bound is not None:
                lines += [f"{field.name}: {bound.problem}", *(f"  {line}" for line in str(bound).splitlines())]
        return "\n".join(lines)


def plan_experts(
    config: LatentMoEConfig,
    num_rows: int,
    w_in_shape: tuple[int, ...],
    w_out_shape: tuple[int, ...],
    dtype,
    *,
    w_in: Operand | None = None,
    w_out: Operand | None = None,
    device: Device | None = None,
) -> ExpertPlan:
    """The decisions for one block of experts.

    Args:
        config: read for the activation and the backend.
        num_rows: R.
        w_in_shape: (E, l, m), gated (E, l, 2 m).
        w_out_shape: (E, m, l).
        dtype: of the rows.
        w_in: how w_in is stored, where it is not an array of dtype.
        w_out: how w_out is stored, likewise.
        device: where they run; None is JAX's default device.

    Raises:
        UnsupportedError: the named backend cannot run one of the products.
        ConfigError: the user's table of tiles cannot be read.
    """
    device, activation = device or current_device(), config.bound_activation
    dense = problem("fwd", num_rows, w_in_shape, dtype, device=device).lhs
    table = dataclasses.replace(dense, layout="gathered")
    frozen_in, frozen_out = (w is not None and w != dense for w in (w_in, w_out))

    def bind(contraction: Contraction, shape, lhs, rhs=None) -> Bound:
        asked = problem(contraction, num_rows, shape, dtype, lhs=lhs, rhs=rhs, device=device)
        return select(asked, config.backend)

    up, down_dgrad = bind("fwd", w_in_shape, table, w_in), bind("dgrad", w_out_shape, table, w_out)
    residual = choose_residual(
        activation,
        lambda residual: fused(up, Epilogue(activation, residual)) is not None,
        lambda residual: fused(down_dgrad, Epilogue(activation, residual)) is not None,
    )
    kept = Epilogue(activation, residual)
    hidden = dataclasses.replace(dense, layout="columns") if residual == "gate_hidden" else dense
    return ExpertPlan(
        activation,
        residual,
        up=fused(up, kept) or up,
        up_without_gradient=fused(up, Epilogue(activation, None)) or up,
        down=bind("fwd", w_out_shape, hidden, w_out),
        down_dgrad=fused(down_dgrad, kept) or down_dgrad,
        down_wgrad=None if frozen_out else bind("wgrad", w_out_shape, hidden, dense if residual == "pre" else table),
        up_dgrad=bind("dgrad", w_in_shape, dense, w_in),
        up_wgrad=None if frozen_in else bind("wgrad", w_in_shape, table),
    )


def choose_residual(
    activation: BoundActivation,
    fuses_value: Callable[[Residual], bool],
    fuses_gradient: Callable[[Residual], bool],
) -> Residual:
    """The first residual of the activation that both passes can work with; the pre-activation serves any backend.

    Args:
        activation: of the experts.
        fuses_value: whether the first product keeps a residual in its kernel.
        fuses_gradient: whether the gradient of the second product reads it in its kernel.
    """
    for residual in activation.definition.residuals:
        if residual in PORTABLE or (fuses_value(residual) and fuses_gradient(residual)):
            return residual
    raise AssertionError("an activation can be differentiated from its pre-activation")
