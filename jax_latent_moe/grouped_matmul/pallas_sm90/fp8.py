"""FP8 rows x FP8 w per expert, with scales for blocks, as one persistent, warp-specialised kernel for Hopper.

The matrix units add FP8 products with some 14 bits. So each 128 of K are multiplied into fresh accumulators, which the
CUDA cores then scale and add in float32, as DeepGEMM does (deep_gemm, sm90_fp8_gemm_1d2d). Both consumer warpgroups
work on one tile. Two tiles at once would need twice the loads: a consumer has two sets of accumulators, which leave no
registers for larger tiles.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from jax_latent_moe.activations import Residual
from jax_latent_moe.formats import ScaledArray, ScaledRows
from jax_latent_moe.formats.fp8 import wide_scales
from jax_latent_moe.grouped_matmul.pallas_sm90 import mgpu as mgpu_code
from jax_latent_moe.grouped_matmul.pallas_sm90.config import PallasFp8Tile
from jax_latent_moe.grouped_matmul.pallas_sm90.epilogues import Activation, Place, Product, StoreBuffers, zero
from jax_latent_moe.grouped_matmul.pallas_sm90.matmul import WGMMA_ROWS, pad_rows
from jax_latent_moe.grouped_matmul.pallas_sm90.mgpu import COLUMN_BLOCK, CONSUMERS, PRODUCER
from jax_latent_moe.grouped_matmul.pallas_sm90.schedule import ROW_ALIGNMENT, in_bands, row_tiles
from jax_latent_moe.grouped_matmul.sm90 import KernelActivation

E4M3 = jnp.float8_e4m3fn
BLOCK = 128
"""The elements of K that a stage holds and that share a scale, and the outputs that share one."""


class Blocks:
    """A product [64, columns] as blocks of 64 columns, with the array methods that an epilogue uses."""

    def __init__(self, blocks):
        self.blocks = blocks

    def astype(self, dtype):
        """The same blocks in another dtype."""
        return Blocks([block.astype(dtype) for block in self.blocks])

    def __getitem__(self, index):
        """A block, indexed by its rows (always all) and its columns."""
        _, columns = index
        return self.blocks[columns.start // COLUMN_BLOCK]


def matmul_fp8(
    rows: ScaledRows,
    w: ScaledArray,
    group_sizes: Int[Array, " e"],
    *,
    activation: KernelActivation | None = None,
    residual: Residual | None = None,
    tile: PallasFp8Tile,
    num_sms: int,
    interpret=None,
) -> Sequence[Array]:
    """rows[R,K] x w[e] -> [R,N] in the dtype of rows, for the rows of each expert, or its activation.

    Args:
        rows: [R, K] in block FP8, sorted by expert. K is a multiple of 128, or of 64 in the interpreter. N is a
            multiple of 64.
        w: [E, K, N] in block FP8.
        group_sizes: [E], on the device.
        activation: an activation to apply to the product, rounded to the dtype of rows.
        residual: "pre" stores the pre-activation as well.
        tile: tile shape and schedule, with at least 2 store_buffers if there is an activation. If that is gated, it has
            at least 3, and each consumer's columns are a multiple of 128: 64 of gate and 64 of up.
        num_sms: SMs to run on.
        interpret: parameters of Pallas' GPU interpreter, to run on a CPU.

    Returns:
        (out,), or with an activation (hidden,) or (pre, hidden). Rows beyond sum(group_sizes) are zero.
    """
    num_rows, k = rows.shape
    experts, parts, n, _ = w.codes.shape
    halves = activation is not None and activation.gated
    width = n if halves else parts * n
    widths = [width] if residual != "pre" else [parts * n, width]
    row_codes = lax.bitcast_convert_type(pad_rows(rows.codes), E4M3)
    # A tile reads scales of 64 rows for one block of K at a time. The last tile begins less than 64 rows from the end.
    row_scales = jnp.pad(wide_scales(rows.scales), ((0, 2 * WGMMA_ROWS), (0, 0))).T
    w_codes = lax.bitcast_convert_type(w.codes, E4M3).reshape(experts, parts * n, k)
    swizzled, native = mgpu_code.swizzled(E4M3), interpret is not None
    out_smem = plgpu.SMEM(
        (CONSUMERS, tile.store_buffers, WGMMA_ROWS, COLUMN_BLOCK), rows.dtype, transforms=mgpu_code.swizzled(rows.dtype)
    )
    kernel = functools.partial(
        _kernel,
        epilogue=functools.partial(Product if activation is None else Activation, activation),
        num_outs=len(widths),
        width=width,
        n=n,
        halves=halves,
        tile=tile,
        clusters=num_sms // tile.cluster,
        native=native,
    )
    return plgpu.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct((num_rows, size), rows.dtype) for size in widths),
        scratch_types=[
            plgpu.SMEM((tile.stages, tile.rows, BLOCK), E4M3, transforms=swizzled),
            plgpu.SMEM((tile.stages, tile.columns, BLOCK), E4M3, transforms=swizzled),
            out_smem,
            plgpu.Barrier(num_arrivals=1 + len(_pieces(tile, halves)), num_barriers=tile.stages),
            mgpu_code.freed_barrier(tile.cluster, tile.stages, arrivals=CONSUMERS),
        ],
        interpret=interpret,
        **mgpu_code.launch(num_sms, tile.cluster),
    )(*row_tiles(group_sizes, num_rows, tile.rows), row_codes, row_scales, w_codes, wide_scales(w.scales))


def _pieces(tile: PallasFp8Tile, halves: bool) -> list[tuple[int, int, int, int]]:
    """(part, first column of the output, first column of the stage, columns) of each load of a stage of w.

    With gate and up columns, each 64 gate columns are followed by the 64 up columns of the same hidden columns.
    """
    if not halves:
        return [(0, 0, 0, tile.columns)]
    blocks = range(tile.columns // COLUMN_BLOCK)
    return [(block % 2, block // 2 * COLUMN_BLOCK, block * COLUMN_BLOCK, COLUMN_BLOCK) for block in blocks]


def _kernel(
    table,
    counts,
    rows,
    row_scales,
    w,
    w_scales,
    *refs,
    epilogue,
    num_outs,
    width,
    n,
    halves,
    tile,
    clusters,
    native,
):
    """A producer warpgroup fills a ring of stages with 128 of K each; two consumers multiply every stage.

    A tile of 128 rows is shared by rows, one of 64 rows by columns. The SMs of a cluster take neighbouring columns of
    one row tile, and each loads its part of the rows for all of them.
    """
    outs = refs[:num_outs]
    a_smem, b_smem, out_smem, filled, freed = refs[num_outs:]
    out_columns = tile.columns // (2 if halves else 1)
    by_rows = tile.rows > WGMMA_ROWS
    own_columns = tile.columns // (1 if by_rows else CONSUMERS)
    assert own_columns % (2 * COLUMN_BLOCK if halves else COLUMN_BLOCK) == 0
    num_blocks = own_columns // COLUMN_BLOCK
    warpgroup, cluster, rank = (lax.axis_index(name) for name in ("wg", "cluster_grid", "cluster"))
    column_tiles = pl.cdiv(width, out_columns * tile.cluster)
    steps = pl.cdiv(rows.shape[1], BLOCK)
    expert_tiles = counts[0]
    my_tiles = lax.div(expert_tiles * column_tiles - cluster + (clusters - 1), clusters)

    def locate(i):
        """Row tile and first column of the i-th tile."""
        row_tile, column = in_bands(cluster + i * clusters, tile.band, expert_tiles, column_tiles)
        return row_tile, (column * tile.cluster + rank) * out_columns

    def place_of(row_tile, column):
        """The part of a tile that a consumer computes and stores."""
        row, begin, end = table[1, row_tile], table[2, row_tile], table[3, row_tile]
        if not by_rows:
            return Place(row, column + warpgroup * (out_columns // CONSUMERS), begin, end, WGMMA_ROWS)
        first = warpgroup * WGMMA_ROWS
        begin, end = (jnp.clip(edge - first, 0, WGMMA_ROWS) for edge in (begin, end))
        return Place(row + first, column, begin, end, WGMMA_ROWS)

    @pl.when(warpgroup == PRODUCER)
    def _produce():
        plgpu.set_max_registers(mgpu_code.PRODUCER_REGISTERS, action="decrease")

        def load_tile(i, buffer):
            row_tile, column = locate(i)
            expert, row = table[0, row_tile], pl.multiple_of(table[1, row_tile], ROW_ALIGNMENT)

            def step(k, buffer):
                plgpu.barrier_wait(freed.at[buffer])
                depth, full = pl.ds(k * BLOCK, BLOCK), filled.at[buffer]
                own_rows = pl.ds(row, tile.rows)
                shared = "cluster" if tile.cluster > 1 else None
                plgpu.copy_gmem_to_smem(rows.at[own_rows, depth], a_smem.at[buffer], full, collective_axes=shared)
                for part, out_column, smem_column, columns in _pieces(tile, halves):
                    first = pl.multiple_of(part * n + column + out_column, COLUMN_BLOCK)
                    plgpu.copy_gmem_to_smem(
                        w.at[expert, pl.ds(first, columns), depth],
                        b_smem.at[buffer, pl.ds(smem_column, columns)],
                        full,
                    )
                return mgpu_code.next_stage(buffer, tile.stages)

            return lax.fori_loop(0, steps, step, buffer)

        mgpu_code.drain(freed, tile.stages, lax.fori_loop(0, my_tiles, load_tile, jnp.int32(0)))

    @pl.when(warpgroup < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(mgpu_code.CONSUMER_REGISTERS, action="increase")
        mgpu_code.free_all(freed, tile.stages, warpgroup < CONSUMERS)
        out_blocks = num_blocks // (2 if halves else 1)
        fused = epilogue(
            StoreBuffers(out_smem.at[warpgroup], out_blocks, width, native=native), (), outs, (), warpgroup
        )
        my_rows = pl.ds(pl.multiple_of(warpgroup * WGMMA_ROWS, WGMMA_ROWS) if by_rows else 0, WGMMA_ROWS)
        my_columns = pl.ds(0 if by_rows else pl.multiple_of(warpgroup * own_columns, COLUMN_BLOCK), own_columns)

        def scales_of(expert, place, k):
            """The scales of 64 rows, and the weight's scale for each block of 64 columns.

            Both are read straight from global memory: a step ahead, because that takes as long as a product.
            """
            of_rows = plgpu.load(
                row_scales.at[k, pl.ds(place.row, WGMMA_ROWS)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
            )
            found = []
            for block in range(num_blocks):
                if halves:
                    part, column = block % 2, place.column + block // 2 * COLUMN_BLOCK
                else:
                    # Gate and up columns side by side. Blocks beyond the last column are not stored.
                    column = jnp.minimum(place.column + block * COLUMN_BLOCK, width - COLUMN_BLOCK)
                    part = lax.div(column, n)
                    column -= part * n
                n_block = jnp.minimum(lax.div(column, BLOCK), w_scales.shape[2] - 1)
                found.append(w_scales[expert, part, n_block, k])
            return of_rows, found

        def one_tile(i, buffer):
            row_tile, column = locate(i)
            expert, place = table[0, row_tile], place_of(row_tile, column)

            def step(k, carry):
                buffer, (row_scale, scales), sums = carry
                following = scales_of(expert, place, jnp.minimum(k + 1, steps - 1))
                plgpu.barrier_wait(filled.at[buffer])

                def multiply(acc):
                    plgpu.wgmma(acc, a_smem.at[buffer, my_rows], b_smem.at[buffer, my_columns].transpose((1, 0)))
                    return acc[...]

                product = pl.run_scoped(multiply, plgpu.ACC((WGMMA_ROWS, own_columns), jnp.float32))
                plgpu.barrier_arrive(freed.at[buffer])
                sums = [
                    total + _block(product, block) * lax.broadcast_in_dim(row_scale * scale, total.shape, (0,))
                    for block, (total, scale) in enumerate(zip(sums, scales, strict=True))
                ]
                return mgpu_code.next_stage(buffer, tile.stages), following, sums

            zeros = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, COLUMN_BLOCK), jnp.float32), plgpu.Layout.WGMMA)
            start = buffer, scales_of(expert, place, 0), [zeros] * num_blocks
            buffer, _, sums = lax.fori_loop(0, steps, step, start)
            fused.finish(place, Blocks(sums))
            return buffer

        lax.fori_loop(0, my_tiles, one_tile, jnp.int32(0))

        # Padding rows get zeros.
        @pl.loop(cluster, (counts[1] - expert_tiles) * column_tiles, step=clusters)
        def _zero_tile(i):
            row_tile = expert_tiles + lax.div(i, column_tiles)
            column = (lax.rem(i, column_tiles) * tile.cluster + rank) * out_columns
            zero(fused, place_of(row_tile, column))

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _block(product, block):
    return product[:, block * COLUMN_BLOCK : (block + 1) * COLUMN_BLOCK]
