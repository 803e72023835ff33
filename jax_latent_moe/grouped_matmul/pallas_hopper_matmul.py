"""rows x w and rows x w^T per expert as one persistent, warp-specialised Mosaic GPU kernel for Hopper."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jax_latent_moe.config import PallasMatmulTile
from jax_latent_moe.grouped_matmul import pallas_hopper_mgpu as mgpu_code
from jax_latent_moe.grouped_matmul.pallas_hopper_mgpu import COLUMN_BLOCK, CONSUMERS, CONTRACTED, PRODUCER
from jax_latent_moe.grouped_matmul.pallas_hopper_schedule import ROW_ALIGNMENT, row_tiles

WGMMA_ROWS = 64


def rows_w(
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
        transpose_w: contract the last axis of w; done by the layout of the tile, not by a copy.
        tile: tile shape and schedule.
        num_sms: multiprocessors to run on.
        interpret: parameters of Pallas' GPU interpreter, to run on a CPU.

    Returns:
        [R, N] (or [R, K]) in the dtype of rows, accumulated in float32; zero rows beyond sum(group_sizes).
    """
    num_rows, out_features = rows.shape[0], w.shape[1 if transpose_w else 2]
    rows = jnp.pad(rows, ((0, -num_rows % ROW_ALIGNMENT), (0, 0)))
    tiles = row_tiles(group_sizes, num_rows, tile.rows)
    b_shape = (tile.columns, CONTRACTED) if transpose_w else (CONTRACTED, tile.columns)
    transforms = mgpu_code.swizzled(rows.dtype)
    kernel = functools.partial(
        _kernel,
        transpose_w=transpose_w,
        tile=tile,
        clusters=num_sms // tile.cluster,
        native=interpret is not None,
    )
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, out_features), rows.dtype),
        scratch_types=[
            plgpu.SMEM((tile.stages, tile.rows, CONTRACTED), rows.dtype, transforms=transforms),
            plgpu.SMEM((tile.stages, *b_shape), rows.dtype, transforms=transforms),
            plgpu.SMEM((CONSUMERS, tile.out_slots, tile.rows, COLUMN_BLOCK), rows.dtype, transforms=transforms),
            plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS * tile.stages),
            mgpu_code.freed_barrier(tile.cluster, tile.stages),
        ],
        interpret=interpret,
        **mgpu_code.launch(num_sms, tile.cluster),
    )(*tiles, rows, w)


def _kernel(
    table,
    counts,
    rows,
    w,
    out,
    a_smem,
    b_smem,
    out_smem,
    filled,
    freed,
    *,
    transpose_w,
    tile,
    clusters,
    native,
):
    """Two consumer warpgroups take turns: one multiplies its tile while the other stores its own (ping-pong).

    All stages form one ring: the producer fills it tile after tile. `filled` has a barrier per consumer and stage, so
    that each consumer sees every phase of its own barriers; `freed` has one per stage. The multiprocessors of a
    cluster take neighbouring columns of one row tile, and each loads its part of the rows for all of them.
    """
    warpgroup, cluster, rank = (lax.axis_index(name) for name in ("wg", "cluster_grid", "cluster"))
    column_tiles = pl.cdiv(out.shape[1], tile.columns * tile.cluster)
    steps = pl.cdiv(rows.shape[1], CONTRACTED)
    expert_tiles = counts[0]
    my_tiles = lax.div(expert_tiles * column_tiles - cluster + (clusters - 1), clusters)

    def locate(i):
        """Row tile and first column of the i-th tile: bands of row tiles, the columns slowest within a band."""
        linear = cluster + i * clusters
        band = lax.div(linear, tile.band * column_tiles)
        within = linear - band * (tile.band * column_tiles)
        height = jnp.minimum(expert_tiles - band * tile.band, tile.band)
        column = lax.div(within, height)
        return band * tile.band + within - column * height, (column * tile.cluster + rank) * tile.columns

    def for_height(end, body):
        """Rows that a tile does not have are not multiplied: the code exists for each multiple of 64 rows."""
        for height in range(WGMMA_ROWS, tile.rows + 1, WGMMA_ROWS):
            pl.when((end > height - WGMMA_ROWS) & (end <= height))(functools.partial(body, height))

    def store(row, column, begin, end, height, value_of_block):
        for block in range(tile.columns // COLUMN_BLOCK):
            smem = out_smem.at[warpgroup, block % tile.out_slots, pl.ds(0, height)]
            plgpu.wait_smem_to_gmem(min(block, tile.out_slots - 1), wait_read_only=True)
            smem[...] = value_of_block(block)
            plgpu.commit_smem()
            mgpu_code.store_rows(smem, out, row, column + block * COLUMN_BLOCK, begin, end, native=native)

    @pl.when(warpgroup == PRODUCER)
    def _produce():
        plgpu.set_max_registers(mgpu_code.PRODUCER_REGISTERS, action="decrease")

        def load_tile(i, slot):
            row_tile, column = locate(i)
            expert, row, end = table[0, row_tile], pl.multiple_of(table[1, row_tile], ROW_ALIGNMENT), table[3, row_tile]
            column = pl.multiple_of(column, COLUMN_BLOCK)
            mine = lax.rem(i, CONSUMERS) * tile.stages

            def load(height):
                def step(k, slot):
                    inner = pl.ds(k * CONTRACTED, CONTRACTED)
                    outer = pl.ds(column, tile.columns)
                    plgpu.barrier_wait(freed.at[slot])
                    plgpu.copy_gmem_to_smem(
                        rows.at[pl.ds(row, height), inner],
                        a_smem.at[slot, pl.ds(0, height)],
                        filled.at[mine + slot],
                        collective_axes="cluster" if tile.cluster > 1 else None,
                    )
                    plgpu.copy_gmem_to_smem(
                        w.at[(expert, outer, inner) if transpose_w else (expert, inner, outer)],
                        b_smem.at[slot],
                        filled.at[mine + slot],
                    )
                    return mgpu_code.next_slot(slot, tile.stages)

                lax.fori_loop(0, steps, step, slot)

            for_height(end, load)
            return lax.rem(slot + steps, tile.stages)

        mgpu_code.drain(freed, tile.stages, lax.fori_loop(0, my_tiles, load_tile, jnp.int32(0)))

    @pl.when(warpgroup < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(mgpu_code.CONSUMER_REGISTERS, action="increase")
        mgpu_code.free_all(freed, tile.stages, warpgroup == 0)
        mine = warpgroup * tile.stages

        @pl.loop(warpgroup, my_tiles, step=CONSUMERS)
        def _tile(i):
            row_tile, column = locate(i)
            row, begin, end = table[1, row_tile], table[2, row_tile], table[3, row_tile]
            first_slot = lax.rem(i * steps, tile.stages)

            def multiply(height):
                def accumulate(acc):
                    def one(slot):
                        b = b_smem.at[slot]
                        plgpu.barrier_wait(filled.at[mine + slot])
                        plgpu.wgmma(acc, a_smem.at[slot, pl.ds(0, height)], b.transpose((1, 0)) if transpose_w else b)

                    def step(_, slot):
                        after = mgpu_code.next_slot(slot, tile.stages)
                        one(after)
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(freed.at[slot])
                        return after

                    one(first_slot)
                    last_slot = lax.fori_loop(1, steps, step, first_slot)
                    return acc[...], last_slot

                value, last_slot = pl.run_scoped(accumulate, plgpu.ACC((height, tile.columns), jnp.float32))
                plgpu.barrier_arrive(freed.at[last_slot])
                value = value.astype(out.dtype)
                store(row, column, begin, end, height, lambda b: value[:, b * COLUMN_BLOCK : (b + 1) * COLUMN_BLOCK])

            for_height(end, multiply)

        # Rows of nobody: zeros, shared out over all consumers.
        @pl.loop(cluster * CONSUMERS + warpgroup, (counts[1] - expert_tiles) * column_tiles, step=clusters * CONSUMERS)
        def _zero_tile(i):
            row_tile = expert_tiles + lax.div(i, column_tiles)
            column = (lax.rem(i, column_tiles) * tile.cluster + rank) * tile.columns
            zeros = plgpu.layout_cast(jnp.zeros((tile.rows, COLUMN_BLOCK), out.dtype), plgpu.Layout.WGMMA)
            store(table[1, row_tile], column, table[2, row_tile], table[3, row_tile], tile.rows, lambda _: zeros)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
