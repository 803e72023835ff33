"""rows^T x dout per expert as one persistent, warp-specialised Mosaic GPU kernel for Hopper."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jax_latent_moe.grouped_matmul.pallas_sm90 import mgpu as mgpu_code
from jax_latent_moe.grouped_matmul.pallas_sm90.config import PallasWgradTile
from jax_latent_moe.grouped_matmul.pallas_sm90.mgpu import COLUMN_BLOCK, CONSUMERS, CONTRACTED, PRODUCER
from jax_latent_moe.grouped_matmul.pallas_sm90.schedule import ROW_ALIGNMENT, group_bounds


def wgrad(
    rows: Float[Array, "r k"],
    dout: Float[Array, "r n"],
    group_sizes: Int[Array, " e"],
    *,
    tile: PallasWgradTile,
    num_sms: int,
    interpret=None,
) -> Float[Array, "e k n"]:
    """rows^T x dout over the rows of each expert: [R,K], [R,N] -> [E,K,N].

    Args:
        rows: [R, K], bfloat16 or float16, sorted by expert; K and N are multiples of 64.
        dout: [R, N], in the dtype of rows.
        group_sizes: [E], on the device.
        tile: tile shape and schedule.
        num_sms: SMs to run on.
        interpret: parameters of Pallas' GPU interpreter, to run on a CPU.

    Returns:
        [E, K, N] in the dtype of rows, accumulated in float32. An expert without rows gets exact zeros.
    """
    num_rows, in_features = rows.shape
    experts, out_features = group_sizes.shape[0], dout.shape[1]
    # TMA reads rows in blocks of 8.
    rows, dout = (jnp.pad(x, ((0, -num_rows % ROW_ALIGNMENT), (0, 0))) for x in (rows, dout))
    swizzled = mgpu_code.swizzled(rows.dtype)
    return plgpu.kernel(
        functools.partial(_kernel, tile=tile, clusters=num_sms // tile.cluster, native=interpret is not None),
        out_type=jax.ShapeDtypeStruct((experts, in_features, out_features), rows.dtype),
        scratch_types=[
            plgpu.SMEM((tile.stages, CONTRACTED, tile.rows), rows.dtype, transforms=swizzled),
            plgpu.SMEM((tile.stages, CONTRACTED, tile.columns), rows.dtype, transforms=swizzled),
            plgpu.SMEM((CONSUMERS, tile.store_buffers, tile.rows, COLUMN_BLOCK), rows.dtype, transforms=swizzled),
            plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS * tile.stages),
            mgpu_code.freed_barrier(tile.cluster, tile.stages),
        ],
        interpret=interpret,
        **mgpu_code.launch(num_sms, tile.cluster),
    )(jnp.stack(group_bounds(group_sizes, num_rows)), rows, dout)


def _kernel(bounds, rows, dout, out, a_smem, b_smem, out_smem, filled, freed, *, tile, clusters, native):
    """The ping-pong of `matmul`, contracting over the rows of one expert.

    The rows of a tile start at a multiple of 8, so the first and last loads may hold rows of other experts. These are
    cleared in shared memory before they are multiplied. The SMs of a cluster take neighbouring tiles of K and share the
    loads of dout.
    """
    warpgroup, cluster, rank = (lax.axis_index(name) for name in ("wg", "cluster_grid", "cluster"))
    experts, in_features, out_features = out.shape
    column_tiles = pl.cdiv(out_features, tile.columns)
    expert_tiles = pl.cdiv(in_features, tile.rows * tile.cluster) * column_tiles
    my_tiles = lax.div(experts * expert_tiles - cluster + (clusters - 1), clusters)

    def locate(i):
        """Expert, k and n of the i-th tile of this SM, its first row, and the expert's rows counted from that row."""
        linear = cluster + i * clusters
        expert = lax.div(linear, expert_tiles)
        within = linear - expert * expert_tiles
        k_tile = lax.div(within, column_tiles)
        k, n = (k_tile * tile.cluster + rank) * tile.rows, (within - k_tile * column_tiles) * tile.columns
        start, end = bounds[0, expert], bounds[1, expert]
        begin = lax.rem(start, ROW_ALIGNMENT)
        first = start - begin
        return expert, k, n, first, begin, jnp.where(end > start, end - first, 0)

    @pl.when(warpgroup == PRODUCER)
    def _produce():
        plgpu.set_max_registers(mgpu_code.PRODUCER_REGISTERS, action="decrease")

        def load_tile(i, buffer):
            _, k, n, first, _, end = locate(i)
            k, n = pl.multiple_of(k, COLUMN_BLOCK), pl.multiple_of(n, COLUMN_BLOCK)
            first = pl.multiple_of(first, ROW_ALIGNMENT)
            mine = lax.rem(i, CONSUMERS) * tile.stages

            def step(j, buffer):
                chunk = pl.ds(first + j * CONTRACTED, CONTRACTED)
                barrier = filled.at[mine + buffer]
                plgpu.barrier_wait(freed.at[buffer])
                plgpu.copy_gmem_to_smem(rows.at[chunk, pl.ds(k, tile.rows)], a_smem.at[buffer], barrier)
                plgpu.copy_gmem_to_smem(
                    dout.at[chunk, pl.ds(n, tile.columns)],
                    b_smem.at[buffer],
                    barrier,
                    collective_axes="cluster" if tile.cluster > 1 else None,
                )
                return mgpu_code.next_stage(buffer, tile.stages)

            return lax.fori_loop(0, _steps(end), step, buffer)

        mgpu_code.drain(freed, tile.stages, lax.fori_loop(0, my_tiles, load_tile, jnp.int32(0)))

    @pl.when(warpgroup < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(mgpu_code.CONSUMER_REGISTERS, action="increase")

        mgpu_code.free_all(freed, tile.stages, warpgroup == 0)
        mine = warpgroup * tile.stages

        def consume_tile(i, buffer):
            expert, k, n, _, begin, end = locate(i)
            steps = _steps(end)

            @pl.when(lax.rem(i, CONSUMERS) == warpgroup)
            def _mine():
                def accumulate(acc):
                    def one(j, buffer):
                        plgpu.barrier_wait(filled.at[mine + buffer])
                        low, high = begin - j * CONTRACTED, end - j * CONTRACTED

                        @pl.when((low > 0) | (high < CONTRACTED))
                        def _():
                            mgpu_code.clear_rows(a_smem.at[buffer], low, high, native=native)
                            mgpu_code.clear_rows(b_smem.at[buffer], low, high, native=native)
                            plgpu.commit_smem()

                        plgpu.wgmma(acc, a_smem.at[buffer].transpose((1, 0)), b_smem.at[buffer])

                    def step(j, buffer):
                        after = mgpu_code.next_stage(buffer, tile.stages)
                        one(j, after)
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(freed.at[buffer])
                        return after

                    @pl.when(steps > 0)
                    def _():
                        one(0, buffer)

                    last_stage = lax.fori_loop(1, steps, step, buffer)
                    return acc[...], last_stage

                value, last_stage = pl.run_scoped(accumulate, plgpu.ACC((tile.rows, tile.columns), jnp.float32))

                @pl.when(steps > 0)
                def _():
                    plgpu.barrier_arrive(freed.at[last_stage])

                value = value.astype(out.dtype)
                for block in range(tile.columns // COLUMN_BLOCK):
                    smem = out_smem.at[warpgroup, block % tile.store_buffers]
                    plgpu.wait_smem_to_gmem(min(block, tile.store_buffers - 1), wait_read_only=True)
                    smem[...] = value[:, block * COLUMN_BLOCK : (block + 1) * COLUMN_BLOCK]
                    plgpu.commit_smem()
                    column = pl.multiple_of(n + block * COLUMN_BLOCK, COLUMN_BLOCK)
                    plgpu.copy_smem_to_gmem(
                        smem,
                        out.at[expert, pl.ds(pl.multiple_of(k, COLUMN_BLOCK), tile.rows), pl.ds(column, COLUMN_BLOCK)],
                    )

            return lax.rem(buffer + steps, tile.stages)

        lax.fori_loop(0, my_tiles, consume_tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _steps(end):
    return lax.div(end + (CONTRACTED - 1), CONTRACTED)
