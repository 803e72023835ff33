"""The embedding: a row of a table for each token, with a gradient that needs no atomic additions.

The usual gradient is a scatter-add. Text uses few tokens very often, and on a GPU the atomic additions to one row wait
for each other. Here the gradient of a small table is a matrix product with the one-hot tokens. The gradient of a large
table sums sorted rows chunk by chunk. Both add in float32 and in a fixed order.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from examples.train.placing import PARALLEL
from jax_latent_moe.parallel import token_spec

ONE_HOT_ROWS = 2048
"""The largest table, in rows, whose gradient is a one-hot product. The work of that product grows with the table."""
CHUNK = 256


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(table: Float[Array, "v d"], tokens: Int[Array, "batch time"], dtype: str) -> Float[Array, "batch time d"]:
    """table[tokens] in `dtype`. The tokens must lie in [0, v)."""
    return jnp.take(table, tokens, axis=0, mode="clip").astype(dtype)


def _forward(table, tokens, dtype):
    return embed(table, tokens, dtype), (tokens, table.shape[0])


def _backward(dtype, residuals, gradient):
    del dtype
    tokens, rows = residuals
    add = one_hot_sum if rows <= ONE_HOT_ROWS else sorted_sum
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return add(tokens, gradient, rows), None
    spec = token_spec(PARALLEL, mesh)

    def of_device(tokens, gradient):
        # With fsdp, XLA by itself gathers all tokens' gradients instead of adding up tables.
        return jax.lax.psum(add(tokens, gradient, rows), spec[0] if spec else ())

    return jax.shard_map(of_device, in_specs=spec, out_specs=PartitionSpec(), check_vma=False)(tokens, gradient), None


embed.defvjp(_forward, _backward)


def one_hot_sum(
    tokens: Int[Array, "batch time"], values: Float[Array, "batch time d"], rows: int
) -> Float[Array, "{rows} d"]:
    """The sum of the values of each token in float32, as one matrix product."""
    hot = jax.nn.one_hot(tokens, rows, dtype=values.dtype)
    return jnp.einsum(
        "btv,btd->vd", hot, values, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def sorted_sum(
    tokens: Int[Array, "batch time"], values: Float[Array, "batch time d"], rows: int
) -> Float[Array, "{rows} d"]:
    """The sum of the values of each token in float32. The work does not depend on `rows`.

    Sorting puts equal tokens into runs. The sorted values are cut into chunks of fixed length. In each chunk, a product
    with a 0-1 matrix adds up the values of a run at the place where the run begins. A run that continues into later
    chunks leaves one more sum at the start of each of them. These sums are few, and one more product adds them up. Then
    every row of the table is written at most twice.
    """
    ids, values = tokens.reshape(-1), values.reshape(tokens.size, -1)
    order = jnp.argsort(ids)
    order = jnp.pad(order, (0, -order.size % CHUNK))  # padding gets the index `rows`, which is not written
    padding = jnp.arange(order.size) >= tokens.size
    ids = jnp.where(padding, rows, ids[order]).reshape(-1, CHUNK)
    values = values[order].reshape(*ids.shape, -1)

    precise = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    place = jnp.arange(CHUNK)
    changes = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    begin = jax.lax.cummax(jnp.where(changes, place, 0), axis=1)  # the place in the chunk where each value's run begins
    sums = jnp.einsum("cpr,crd->cpd", (place[:, None] == begin[:, None, :]).astype(values.dtype), values, **precise)

    continues = jnp.append(False, ids[1:, 0] == ids[:-1, -1])
    last_begins_here = ~(continues & (begin[:, -1] == 0))
    later = last_begins_here[:, None] & continues & (ids[:, -1:] == ids[:, 0])
    rest = jnp.einsum("ec,cd->ed", later.astype(jnp.float32), sums[:, 0], **precise)

    outside = rows + 1 + jnp.arange(ids.size).reshape(ids.shape)  # dropped values need unique indices too
    begins_here = changes & ~(continues[:, None] & (place == 0))
    where = jnp.where(begins_here & (ids < rows), ids, outside).reshape(-1)
    where_rest = jnp.where(jnp.any(later, axis=1) & (ids[:, -1] < rows), ids[:, -1], outside[:, 0])
    total = jnp.zeros((rows, values.shape[-1]), jnp.float32)
    write = {"mode": "drop", "unique_indices": True}
    total = total.at[where].add(sums.reshape(-1, values.shape[-1]), **write)
    return total.at[where_rest].add(rest, **write)
