"""The experts' biases: each row gets that of its expert."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.grouped_matmul import grouped_wgrad
from jax_latent_moe.grouped_matmul.xla.config import XlaBackend

Biases = tuple[Float[Array, "e *p"], Float[Array, "e l"]]


def plus_bias(rows: Float[Array, "r n"], bias: Float[Array, "e n"] | None, group_sizes) -> Float[Array, "r n"]:
    """The rows plus their experts' biases, if there are any."""
    return rows if bias is None else _plus(rows, bias, group_sizes)


@jax.custom_vjp
def _plus(rows: Float[Array, "r n"], bias: Float[Array, "e n"], group_sizes) -> Float[Array, "r n"]:
    return rows + _bias_of_rows(bias, group_sizes, rows.shape[0])


def _plus_fwd(rows, bias, group_sizes):
    return _plus(rows, bias, group_sizes), group_sizes


def _plus_bwd(group_sizes, dout):
    return dout, bias_gradient(jnp.ones_like(dout[:, 0]), dout, group_sizes), None


_plus.defvjp(_plus_fwd, _plus_bwd)


def bias_gradient(factors: Float[Array, " r"], dout: Float[Array, "r n"], group_sizes) -> Float[Array, "e n"]:
    """The sum over each expert's rows, each times its factor.

    It is a product with a column. A scatter would round each partial sum to 16 bits.
    """
    return grouped_wgrad(factors[:, None], dout, group_sizes, backend=XlaBackend())[:, 0]


def times_bias(rows: Float[Array, "r n"], bias: Float[Array, "e n"], group_sizes) -> Float[Array, " r"]:
    """The dot product of each row with its expert's bias, in at least float32."""
    wide = at_least_float32(rows.dtype)
    return jnp.sum(rows.astype(wide) * _bias_of_rows(bias, group_sizes, rows.shape[0]).astype(wide), axis=1)


def _bias_of_rows(bias: Float[Array, "e n"], group_sizes, num_rows: int) -> Float[Array, "r n"]:
    """The bias of each row's expert, 0 for rows of no expert."""
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(num_rows), side="right")
    exists = expert < bias.shape[0]
    return jnp.where(exists[:, None], bias[jnp.where(exists, expert, 0)], 0)
