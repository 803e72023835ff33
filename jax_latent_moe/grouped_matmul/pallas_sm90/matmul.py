"""rows x w and rows x w^T per expert as one persistent, warp-specialised Mosaic GPU kernel for Hopper."""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from jax_latent_moe.grouped_matmul.pallas_sm90 import mgpu as mgpu_code
from jax_latent_moe.grouped_matmul.pallas_sm90.config import PallasMatmulTile
from jax_latent_moe.grouped_matmul.pallas_sm90.epilogues import Place, Product, StoreBuffers, zero
from jax_latent_moe.grouped_matmul.pallas_sm90.mgpu import COLUMN_BLOCK, CONSUMERS, CONTRACTED, PRODUCER
from jax_latent_moe.grouped_matmul.pallas_sm90.schedule import ROW_ALIGNMENT, in_bands, row_tiles
from jax_latent_moe.grouped_matmul.sm90 import KernelActivation

WGMMA_ROWS = 64


def matmul(
    rows: Float[Array, "r a"],
    w: Float[Array, "e k n"],
    group_sizes: Int[Array, " e"],
    *,
    transpose_w: bool,
    tile: PallasMatmulTile,
    num_sms: int,
    interpret=None,
) -> Float[Array, "r b"]:
    """rows[R,K] x w[e] -> [R,N], or with transpose_w rows[R,N] x w[e]^T -> [R,K], for the rows of each expert.

    Args:
        rows: [R, K] (or [R, N]), bfloat16 or float16, sorted by expert; K and N are multiples of 64.
        w: [E, K, N].
        group_sizes: [E], on the device.
        transpose_w: contract the last axis of w. The layout of the tile does it, without a copy.
        tile: tile shape and schedule.
        num_sms: SMs to run on.
        interpret: parameters of Pallas' GPU interpreter, to run on a CPU.

    Returns:
        [R, N] (or [R, K]) in the dtype of rows, accumulated in float32. Rows beyond sum(group_sizes) are zero.
    """
    num_rows, out_features = rows.shape[0], w.shape[1 if transpose_w else 2]
    (out,) = multiply(
        Product,
        rows,
        w,
        group_sizes,
        out_types=[jax.ShapeDtypeStruct((num_rows, out_features), rows.dtype)],
        transpose_w=transpose_w,
        tile=tile,
        num_sms=num_sms,
        interpret=interpret,
    )
    return out


def multiply(
    epilogue: Callable,
    rows: Float[Array, "r a"],
    w: Float[Array, "e k n"],
    group_sizes: Int[Array, " e"],
    *,
    operands: Sequence[Array] = (),
    out_types: Sequence[jax.ShapeDtypeStruct],
    scratch_types: Sequence = (),
    activation: KernelActivation | None = None,
    transpose_w: bool,
    tile: PallasMatmulTile,
    num_sms: int,
    interpret=None,
) -> Sequence[Array]:
    """Runs the kernel with any epilogue; see `matmul` for the arguments that they share.

    Args:
        epilogue: a class of `epilogues`. Each consumer makes an instance.
        rows: [R, K] (or [R, N]).
        w: [E, K, N].
        group_sizes: [E].
        operands: arrays that the epilogue reads.
        out_types: shapes and dtypes of the arrays that the epilogue stores.
        scratch_types: shared memory and barriers that the epilogue needs besides the buffers of the tile.
        activation: the activation to fuse. If it is gated and w not transposed, a tile holds 64 gate and 64 up columns.
        transpose_w: contract the last axis of w.
        tile: tile shape and schedule.
        num_sms: SMs to run on.
        interpret: parameters of Pallas' GPU interpreter.

    Returns:
        Arrays of out_types.
    """
    num_rows, dtype = rows.shape[0], rows.dtype
    halves = activation is not None and activation.gated and not transpose_w
    width = w.shape[1] if transpose_w else w.shape[2] // (2 if halves else 1)
    tiles = row_tiles(group_sizes, num_rows, tile.rows)
    rows = pad_rows(rows)
    swizzled, native = mgpu_code.swizzled(dtype), interpret is not None
    if halves:
        assert tile.columns == 2 * COLUMN_BLOCK
        # TMA has 5 dimensions: two for the rows of all experts in blocks of 8, two for the columns, one for the halves.
        w = w.reshape(-1, 2, width)
        b_smem = mgpu_code.halves_smem(tile.stages, dtype, native=native)
    else:
        b_shape = (tile.columns, CONTRACTED) if transpose_w else (CONTRACTED, tile.columns)
        b_smem = plgpu.SMEM((tile.stages, *b_shape), dtype, transforms=swizzled)
    kernel = functools.partial(
        _kernel,
        epilogue=functools.partial(epilogue, activation),
        counts_of_refs=(len(operands), len(out_types), len(scratch_types)),
        width=width,
        transpose_w=transpose_w,
        halves=halves,
        tile=tile,
        clusters=num_sms // tile.cluster,
        native=native,
    )
    return plgpu.kernel(
        kernel,
        out_type=tuple(out_types),
        scratch_types=[
            *scratch_types,
            plgpu.SMEM((tile.stages, tile.rows, CONTRACTED), dtype, transforms=swizzled),
            b_smem,
            plgpu.SMEM((CONSUMERS, tile.store_buffers, tile.rows, COLUMN_BLOCK), dtype, transforms=swizzled),
            plgpu.Barrier(num_arrivals=3 if halves and native else 2, num_barriers=CONSUMERS * tile.stages),
            mgpu_code.freed_barrier(tile.cluster, tile.stages),
        ],
        interpret=interpret,
        **mgpu_code.launch(num_sms, tile.cluster),
    )(*tiles, rows, w, *operands)


def pad_rows(rows: Shaped[Array, "r ..."]) -> Shaped[Array, "padded ..."]:
    """Pads rows to a multiple of 8, because TMA reads 8 rows at a time. Rows that need no padding are not copied."""
    return jnp.pad(rows, ((0, -rows.shape[0] % ROW_ALIGNMENT), *((0, 0),) * (rows.ndim - 1)))


def _kernel(
    table,
    counts,
    rows,
    w,
    *refs,
    epilogue,
    counts_of_refs,
    width,
    transpose_w,
    halves,
    tile,
    clusters,
    native,
):
    """Two consumer warpgroups take turns: one multiplies its tile while the other stores its own (ping-pong).

    All stages form one ring, which the producer fills tile after tile. `filled` has a barrier for each consumer and
    stage, so that a consumer sees every phase of its own barriers. `freed` has one for each stage. The SMs of a cluster
    take neighbouring columns of one row tile, and each loads its part of the rows for all of them.
    """
    ends = list(itertools.accumulate(counts_of_refs))
    operands, outs, scratch = (refs[end - count : end] for end, count in zip(ends, counts_of_refs, strict=True))
    a_smem, b_smem, out_smem, filled, freed = refs[ends[-1] :]
    out_columns = tile.columns // (2 if halves else 1)
    warpgroup, cluster, rank = (lax.axis_index(name) for name in ("wg", "cluster_grid", "cluster"))
    column_tiles = pl.cdiv(width, out_columns * tile.cluster)
    steps = pl.cdiv(rows.shape[1], CONTRACTED)
    expert_tiles = counts[0]
    my_tiles = lax.div(expert_tiles * column_tiles - cluster + (clusters - 1), clusters)

    def locate(i):
        """Row tile and first column of the i-th tile."""
        row_tile, column = in_bands(cluster + i * clusters, tile.band, expert_tiles, column_tiles)
        return row_tile, (column * tile.cluster + rank) * out_columns

    def load_w(expert, k, column, buffer, barrier):
        first, columns, b = k * CONTRACTED, pl.ds(column, out_columns), b_smem.at[buffer]
        if halves:
            half_rows = w.at[pl.ds(expert * rows.shape[1] + first, CONTRACTED), :, columns]
            mgpu_code.load_halves(half_rows, b, barrier, native=native)
            return
        depth = pl.ds(first, CONTRACTED)
        plgpu.copy_gmem_to_smem(w.at[(expert, columns, depth) if transpose_w else (expert, depth, columns)], b, barrier)

    def stage_of_w(buffer):
        """A stage of w as [contracted, columns]."""
        if halves:
            return mgpu_code.joined_halves(b_smem.at[buffer], native=native)
        return b_smem.at[buffer].transpose((1, 0)) if transpose_w else b_smem.at[buffer]

    def for_height(end, body):
        """Runs the body for the next multiple of 64 rows: an incomplete tile does not multiply the rows it lacks."""
        for height in range(WGMMA_ROWS, tile.rows + 1, WGMMA_ROWS):
            pl.when((end > height - WGMMA_ROWS) & (end <= height))(functools.partial(body, height))

    @pl.when(warpgroup == PRODUCER)
    def _produce():
        plgpu.set_max_registers(mgpu_code.PRODUCER_REGISTERS, action="decrease")

        def load_tile(i, buffer):
            row_tile, column = locate(i)
            expert, row, end = table[0, row_tile], pl.multiple_of(table[1, row_tile], ROW_ALIGNMENT), table[3, row_tile]
            column = pl.multiple_of(column, COLUMN_BLOCK)
            mine = lax.rem(i, CONSUMERS) * tile.stages

            def load(height):
                def step(k, buffer):
                    plgpu.barrier_wait(freed.at[buffer])
                    plgpu.copy_gmem_to_smem(
                        rows.at[pl.ds(row, height), pl.ds(k * CONTRACTED, CONTRACTED)],
                        a_smem.at[buffer, pl.ds(0, height)],
                        filled.at[mine + buffer],
                        collective_axes="cluster" if tile.cluster > 1 else None,
                    )
                    load_w(expert, k, column, buffer, filled.at[mine + buffer])
                    return mgpu_code.next_stage(buffer, tile.stages)

                lax.fori_loop(0, steps, step, buffer)

            for_height(end, load)
            return lax.rem(buffer + steps, tile.stages)

        mgpu_code.drain(freed, tile.stages, lax.fori_loop(0, my_tiles, load_tile, jnp.int32(0)))

    @pl.when(warpgroup < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(mgpu_code.CONSUMER_REGISTERS, action="increase")
        mgpu_code.free_all(freed, tile.stages, warpgroup == 0)
        mine = warpgroup * tile.stages
        buffers = StoreBuffers(out_smem.at[warpgroup], out_columns // COLUMN_BLOCK, width, native=native)
        fused = epilogue(buffers, operands, outs, scratch, warpgroup)

        @pl.loop(warpgroup, my_tiles, step=CONSUMERS)
        def _tile(i):
            row_tile, column = locate(i)
            row, begin, end = table[1, row_tile], table[2, row_tile], table[3, row_tile]
            first_stage = lax.rem(i * steps, tile.stages)

            def compute(height):
                place = Place(row, column, begin, end, height)
                fused.start(place)

                def accumulate(acc):
                    def one(buffer):
                        plgpu.barrier_wait(filled.at[mine + buffer])
                        plgpu.wgmma(acc, a_smem.at[buffer, pl.ds(0, height)], stage_of_w(buffer))

                    def step(_, buffer):
                        after = mgpu_code.next_stage(buffer, tile.stages)
                        one(after)
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(freed.at[buffer])
                        return after

                    one(first_stage)
                    last_stage = lax.fori_loop(1, steps, step, first_stage)
                    return acc[...], last_stage

                value, last_stage = pl.run_scoped(accumulate, plgpu.ACC((height, tile.columns), jnp.float32))
                plgpu.barrier_arrive(freed.at[last_stage])
                fused.finish(place, value)

            for_height(end, compute)

        # Padding rows get zeros; all consumers share the work.
        @pl.loop(cluster * CONSUMERS + warpgroup, (counts[1] - expert_tiles) * column_tiles, step=clusters * CONSUMERS)
        def _zero_tile(i):
            row_tile = expert_tiles + lax.div(i, column_tiles)
            column = (lax.rem(i, column_tiles) * tile.cluster + rank) * out_columns
            place = Place(table[1, row_tile], column, table[2, row_tile], table[3, row_tile], tile.rows)
            zero(fused, place)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
