"""JAX's own Pallas kernel for the weight gradient, with the best tile of a small sweep."""

# (block_m, block_n, block_k, max_concurrent_steps, grid_block_n)
SWEEP = (
    (128, 128, 64, 4, 4),
    (128, 128, 64, 5, 1),
    (128, 128, 64, 4, 16),
    (64, 128, 64, 6, 4),
    (128, 64, 64, 6, 4),
    (128, 128, 128, 2, 4),
)


def transposed_ragged_dot(tile: tuple, x, dout, sizes):
    """x^T dout per expert: x [R, K], dout [R, N], sizes [E]; raises if a block does not divide K or N."""
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

    names = ("block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n")
    blocks = dict(zip(names, tile, strict=True))
    return transposed_ragged_dot_mgpu.transposed_ragged_dot(x, dout, group_sizes=sizes, **blocks)
