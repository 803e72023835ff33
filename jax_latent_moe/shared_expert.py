"""The shared expert, which every token reads: two dense products around an activation.

XLA reads and writes the hidden rows once more for the activation, and twice more for its gradient. Where a kernel for
grouped matmuls has both in its epilogues, the two products beside the activation are grouped matmuls of one group.
"""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

from jax_latent_moe.activations import Residual, activate
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.derivatives import refused_if_differentiated
from jax_latent_moe.device import Device, current_device
from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.errors import UnsupportedError
from jax_latent_moe.experts import RESIDUAL, hidden_rows
from jax_latent_moe.grouped_matmul import Bound, Epilogue, Operands, fused, problem, select
from jax_latent_moe.grouped_matmul.operands import gathered
from jax_latent_moe.grouped_matmul.registry import name_of
from jax_latent_moe.varying import varying

LEAST_ROWS = 8192
"""The fewest rows at which the kernels were timed beside XLA (benchmarks/results/profiles/h200-2026-11-29.md)."""


@dataclasses.dataclass(frozen=True)
class SharedPlan:
    """The products whose kernels have the activation. XLA computes the others.

    Attributes:
        residual: what the forward pass keeps for the activation's gradient.
        up: the first product when there is a backward pass.
        up_without_gradient: the first product when there is none.
        down_dgrad: the gradient of the pre-activation.
    """

    residual: Residual
    up: Bound
    up_without_gradient: Bound
    down_dgrad: Bound

    def __str__(self) -> str:
        lines = [f"kernels with the activation; the forward pass keeps {self.residual!r}"]
        for field in dataclasses.fields(self)[1:]:
            bound = getattr(self, field.name)
            lines += [f"{field.name}: {bound.problem}", *(f"  {line}" for line in str(bound).splitlines())]
        return "\n".join(lines)


def plan_shared_expert(
    config: LatentMoEConfig, num_rows: int, inner: int, dtype, *, device: Device | None = None
) -> SharedPlan | str:
    """The kernels of the shared expert, or the reason why XLA computes it all, as a sentence.

    Args:
        config: gives the activation, d and the backend.
        num_rows: T.
        inner: its inner width on this device.
        dtype: dtype of the tokens.
        device: the device that runs it; None is JAX's default device.

    Raises:
        ConfigError: the user's table of tiles cannot be read.
    """
    if is_symbolic_dim(num_rows) or num_rows < LEAST_ROWS:
        return f"kernels run from {LEAST_ROWS} tokens on, and {num_rows} are fewer or unknown."
    device, width = device or current_device(), inner * (2 if config.gated else 1)
    try:
        up = select(problem("fwd", num_rows, (1, config.hidden_size, width), dtype, device=device), config.backend)
        if not up.backend.fuses_one_group:
            return f"no fused kernel of {name_of(up.backend.config)} was measured to beat XLA with one group."
        asked = problem("dgrad", num_rows, (1, inner, config.hidden_size), dtype, device=device)
        down_dgrad = select(asked, up.backend.config)
        for residual in config.bound_activation.definition.residuals:
            alone, kept = (Epilogue(config.bound_activation, residual) for residual in (None, residual))
            made = fused(up, kept), fused(up, alone), fused(down_dgrad, kept)
            if None not in made:
                return SharedPlan(residual, *cast(tuple[Bound, Bound, Bound], made))
    except UnsupportedError as error:
        return error.reason
    return f"{name_of(up.backend.config)} does not fuse {config.bound_activation} and its gradient."


def shared_expert(x: Float[Array, "t d"], params, config: LatentMoEConfig) -> Float[Array, "t d"]:
    """act(x w_in) w_out, times sigmoid(x gate) if the parameters have a gate, in the dtype of x.

    Args:
        x: [T, d].
        params: w_in [d, ms], or [d, 2, ms] if gated; w_out [ms, d]; perhaps gate [d, 1].
        config: gives the activation and the backend.
    """
    w_in, w_out = (jnp.asarray(params[name], x.dtype) for name in ("w_in", "w_out"))
    w_in = w_in.reshape(w_in.shape[0], -1)
    plan = plan_shared_expert(config, x.shape[0], w_out.shape[0], x.dtype)
    if isinstance(plan, SharedPlan):
        out = _fused(plan, *varying((x, w_in, w_out), x, w_in, w_out))
    else:
        out = activate(x @ w_in, config.bound_activation).astype(x.dtype) @ w_out
    if "gate" not in params:
        return out
    wide = at_least_float32(x.dtype)
    gate = jnp.matmul(x, params["gate"].astype(x.dtype), preferred_element_type=wide)
    return (out.astype(wide) * jax.nn.sigmoid(gate)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(plan, x, w_in, w_out):
    return _hidden(plan.up_without_gradient, x, w_in).out @ w_out


def _fused_fwd(plan, x, w_in, w_out):
    outputs = _hidden(plan.up, x, w_in)
    return gathered(outputs.out) @ w_out, (x, w_in, w_out, checkpoint_name(outputs.residual, RESIDUAL))


def _fused_bwd(plan, residuals, dout):
    (x, w_in, w_out, kept), dout = refused_if_differentiated(_ONCE, (residuals, dout))
    rows = x.shape[0]
    dw_out = None
    if plan.residual != "pre":
        dw_out = _transposed(gathered(hidden_rows(plan, kept)), dout)
        # The kernel may overwrite the residual with the gradient, so this product must read the residual first.
        kept, dw_out = jax.lax.optimization_barrier((kept, dw_out))
    ones = jnp.ones(rows, jnp.float32)
    outputs = plan.down_dgrad(Operands(dout, w_out[None], _one_group(rows), kept, ones))
    if dw_out is None:
        dw_out = _transposed(outputs.hidden, dout)
    return outputs.out @ w_in.T, _transposed(x, outputs.out), dw_out


_fused.defvjp(_fused_fwd, _fused_bwd)

_ONCE = "The fused kernels of the shared expert have first derivatives alone: set backend=CutlassBackend(fuse='never')."


def _hidden(product, x, w_in):
    return product(Operands(x, w_in[None], _one_group(x.shape[0])))


def _one_group(rows):
    return jnp.full(1, rows, jnp.int32)


def _transposed(rows, others):
    """rows^T others."""
    return jax.lax.dot_general(rows, others, (((0,), (0,)), ((), ())))
