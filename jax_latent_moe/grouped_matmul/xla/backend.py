"""The `xla` backend: grouped matmul in plain XLA operations, on every device and with every format."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.formats import ScaledRows, decoded
from jax_latent_moe.grouped_matmul.backend import Backend
from jax_latent_moe.grouped_matmul.groups import group_ends
from jax_latent_moe.grouped_matmul.operands import Outputs
from jax_latent_moe.grouped_matmul.xla.blocked import blocked_matmul, blocked_wgrad
from jax_latent_moe.grouped_matmul.xla.ragged_dot import ragged_matmul, ragged_wgrad


class Xla(Backend):
    """The `xla` backend: see `XlaBackend` for its methods."""

    def supports(self, problem):
        """Every plain product, of any shape, format and device."""
        if problem.epilogue is None:
            return None
        return "it has no epilogues: the activation runs after its products."

    def run(self, problem, tile, operands):
        """See `Backend.run`."""
        lhs, rhs, group_sizes = operands.lhs, operands.rhs, _cut(operands.group_sizes, problem.num_rows)
        if isinstance(lhs, ScaledRows):
            # Codes times scales have more bits than the 16 of the result, as in kernels that multiply the codes.
            wide = operands._replace(lhs=lhs.decode(at_least_float32(lhs.dtype)))
            return Outputs(self.run(problem, tile, wide).out.astype(problem.out.format))
        ragged, settings = self.config.method == "ragged_dot", (self.config.block_rows, problem.device)
        if problem.contraction == "wgrad":
            return Outputs(
                ragged_wgrad(lhs, rhs, group_sizes) if ragged else blocked_wgrad(lhs, rhs, group_sizes, *settings)
            )
        transpose_w = problem.contraction == "dgrad"
        if ragged:
            return Outputs(ragged_matmul(lhs, decoded(rhs, lhs.dtype), group_sizes, transpose_w=transpose_w))
        return Outputs(blocked_matmul(lhs, rhs, group_sizes, *settings, transpose_w=transpose_w))


def _cut(group_sizes, num_rows) -> Int[Array, " e"]:
    return jnp.diff(group_ends(group_sizes, num_rows), prepend=0)
