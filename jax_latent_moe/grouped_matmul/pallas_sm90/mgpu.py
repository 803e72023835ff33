"""Operations that Pallas does not offer, as inlined Mosaic GPU code, and the same operations in plain Pallas.

Pallas moves rows of a swizzled tile only from and to multiples of 8, and row values in multiples of 16 bytes. The
kernels store and clear any range of rows. The interpreter cannot run inlined code, so it uses the plain Pallas
operations (`native=True`).
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm

CONSUMERS = 2
PRODUCER = 2
# Registers per thread: 2 x 128 x 232 + 128 x 40 fit into the 65536 of an SM.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
# The 16-bit columns of one swizzled block, and the depth of a stage.
COLUMN_BLOCK = CONTRACTED = 64

SWIZZLE_BYTES = 128
SWIZZLE_ROWS = 8
WARPGROUP_THREADS = 128


def swizzled(dtype) -> tuple:
    """The transforms of a shared-memory tile that TMA writes and wgmma reads."""
    columns = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    # Pallas' own transforms leave some methods abstract, which only other backends call.
    return (
        plgpu.TilingTransform((SWIZZLE_ROWS, columns)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(SWIZZLE_BYTES),  # pyright: ignore[reportAbstractUsage]
    )


def launch(num_sms: int, cluster: int) -> dict:
    """Arguments of `plgpu.kernel` for a persistent grid: one block per SM, with two consumers and a producer."""
    return dict(
        grid=(num_sms // cluster,),
        grid_names=("cluster_grid",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        # The kernels sum only within a warp.
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
    )


def freed_barrier(cluster: int, stages: int, arrivals: int = 1):
    """One barrier per stage. It completes once every SM of the cluster has freed the stage: they share loads.

    Args:
        cluster: SMs of a cluster.
        stages: stages of the ring.
        arrivals: consumers of an SM that read each stage.
    """
    if cluster == 1:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
    return plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=arrivals, num_barriers=stages)


def free_all(freed, stages: int, predicate):
    """Marks every stage as free, at the start of the kernel."""

    @pl.when(predicate)
    def _():
        for buffer in range(stages):
            plgpu.barrier_arrive(freed.at[buffer])


def drain(freed, stages: int, buffer):
    """Waits until every stage is free: an SM may not exit before its cluster has arrived at its barriers."""
    for _ in range(stages):
        plgpu.barrier_wait(freed.at[buffer])
        buffer = next_stage(buffer, stages)


def next_stage(buffer, stages: int):
    """The next stage in the ring."""
    return jnp.where(buffer == stages - 1, 0, buffer + 1)


def halves_smem(stages: int, dtype, *, native: bool):
    """Stages for 64 gate and 64 up columns. One load fills a stage, and wgmma reads it as 128 columns.

    The memory layout is `swizzled` [64, 128]'s, with the shape [64, 2, 64]. The interpreter cannot change a ref's
    shape, so natively it has the shape [64, 128].
    """
    if native:
        return plgpu.SMEM((stages, CONTRACTED, 2 * COLUMN_BLOCK), dtype, transforms=swizzled(dtype))
    tiling, swizzle = swizzled(dtype)
    tiling = plgpu.TilingTransform((tiling.tiling[0], 1, tiling.tiling[1]))  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM((stages, CONTRACTED, 2, COLUMN_BLOCK), dtype, transforms=(tiling, swizzle))


def load_halves(gmem, smem, barrier, *, native: bool):
    """Starts loading gmem [64, 2, 64] into a stage of `halves_smem`. The barrier gets one arrival, natively two."""
    if not native:
        plgpu.copy_gmem_to_smem(gmem, smem, barrier)
        return
    for half in range(2):
        columns = pl.ds(half * COLUMN_BLOCK, COLUMN_BLOCK)
        plgpu.copy_gmem_to_smem(gmem.at[:, half], smem.at[:, columns], barrier)


def joined_halves(smem, *, native: bool):
    """A stage of `halves_smem` as [64, 128]."""
    return smem if native else smem.reshape(CONTRACTED, 2 * COLUMN_BLOCK)


def powers_of_two(limit: int) -> list[int]:
    """Powers of two up to limit, the largest first."""
    return [1 << bit for bit in reversed(range(limit.bit_length()))]


def store_rows(smem, gmem, row, column, begin, end, *, native: bool):
    """Starts copying rows [begin, end) of smem [h, 64] to gmem at [row + begin, column], as one committed group.

    A TMA box has a static number of rows, so the range is cut into boxes of powers of two. A box may start at any row,
    because the swizzle depends only on the shared-memory address.
    """
    if native:
        return _store_rows_native(smem, gmem, row, column, begin, end)
    scalar = plgpu.Layout.WG_SPLAT
    transforms = swizzled(smem.dtype)
    columns = SWIZZLE_BYTES // jnp.dtype(smem.dtype).itemsize

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), plgpu.RefType(), scalar, scalar, scalar, scalar))
    def store(ctx, tile, out, row, column, begin, end):
        row, column, begin, end = (x.registers.item() for x in (row, column, begin, end))
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        tile = mgpu_utils.memref_fold(tile, 0, 3)
        count = arith.maxsi(arith.subi(end, begin), mgpu.c(0, i32))
        leader = mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARPGROUP)

        def box(first, size):
            return mgpu.ds(arith.index_cast(index, first), size)

        for size in powers_of_two(ir.MemRefType(tile.type).shape[0]):
            taken = arith.andi(count, mgpu.c(size, i32))
            wanted = arith.cmpi(arith.CmpIPredicate.ne, taken, mgpu.c(0, i32))
            ctx.async_copy(
                src_ref=mgpu_utils.memref_slice(tile, (box(begin, size), slice(None))),
                dst_ref=out,
                gmem_slice=(box(arith.addi(row, begin), size), box(column, columns)),
                swizzle=SWIZZLE_BYTES,
                predicate=arith.andi(leader, wanted),
                arrive=False,
            )
            begin = arith.addi(begin, taken)
        nvvm.cp_async_bulk_commit_group()

    store(smem, gmem, *(jnp.asarray(x, jnp.int32) for x in (row, column, begin, end)))


def _store_rows_native(smem, gmem, row, column, begin, end):
    def store(first, size):
        target = gmem.at[pl.ds(row + first, size), pl.ds(column, smem.shape[1])]
        plgpu.copy_smem_to_gmem(smem.at[pl.ds(first, size)], target, commit_group=False)

    _in_boxes(begin, end, smem.shape[0], store)
    plgpu.commit_smem_to_gmem_group()


def _in_boxes(begin, end, limit, store):
    count = jnp.maximum(end - begin, 0)
    for size in powers_of_two(limit):
        taken = count & size
        pl.when(taken != 0)(functools.partial(store, begin, size))
        begin = begin + taken


def store_row_values(smem, gmem, line, row, begin, end, *, native: bool):
    """Stores values [begin, end) of smem [h] to gmem [lines, r] at [line, row + begin], one value per thread."""
    if native:

        def store_box(first, size):
            target = gmem.at[line, pl.ds(row + first, size)]
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(first, size)], target, commit_group=False)

        _in_boxes(begin, end, smem.shape[0], store_box)
        plgpu.commit_smem_to_gmem_group()
        return
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), scalar, scalar, scalar, scalar))
    def store(ctx, values, out, line, row, begin, end):
        del ctx
        line, row, begin, end = (x.registers.item() for x in (line, row, begin, end))
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        thread = arith.remui(mgpu_utils.thread_idx(), mgpu.c(WARPGROUP_THREADS, i32))
        for first in range(0, ir.MemRefType(values.type).shape[0], WARPGROUP_THREADS):
            i = arith.addi(thread, mgpu.c(first, i32))
            own = arith.andi(arith.cmpi(arith.CmpIPredicate.sge, i, begin), arith.cmpi(arith.CmpIPredicate.slt, i, end))
            with mgpu_utils.when(own):
                value = memref.load(values, [arith.index_cast(index, i)])
                memref.store(value, out, [arith.index_cast(index, x) for x in (line, arith.addi(row, i))])

    store(smem, gmem, *(jnp.asarray(x, jnp.int32) for x in (line, row, begin, end)))


def clear_rows(smem, begin, end, *, native: bool):
    """Sets rows of smem [h, c] outside of [begin, end) to zero. The caller makes it visible with `commit_smem`."""
    if native:
        row = lax.broadcasted_iota(jnp.int32, smem.shape, 0)
        smem[...] = jnp.where((row >= begin) & (row < end), smem[...], jnp.zeros((), smem.dtype))
        return
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(smem.dtype)), scalar, scalar))
    def clear(ctx, tile, begin, end):
        del ctx
        begin, end = begin.registers.item(), end.registers.item()
        i32 = ir.IntegerType.get_signless(32)
        row_blocks, column_blocks, _, _ = ir.MemRefType(tile.type).shape
        thread = arith.remui(mgpu_utils.thread_idx(), mgpu.c(WARPGROUP_THREADS, i32))
        base = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(tile))
        address = arith.addi(base, arith.muli(thread, mgpu.c(16, i32)))
        # The swizzle permutes 16-byte pieces within 128 bytes of one row, so whole rows can be cleared as they lie.
        rows_a_step = WARPGROUP_THREADS * 16 // SWIZZLE_BYTES
        line = arith.divui(thread, mgpu.c(SWIZZLE_BYTES // 16, i32))
        for step in range(row_blocks * SWIZZLE_ROWS * column_blocks // rows_a_step):
            lines = arith.addi(line, mgpu.c(step * rows_a_step, i32))
            block = arith.divui(lines, mgpu.c(SWIZZLE_ROWS * column_blocks, i32))
            row = arith.addi(
                arith.muli(block, mgpu.c(SWIZZLE_ROWS, i32)), arith.remui(lines, mgpu.c(SWIZZLE_ROWS, i32))
            )
            outside = arith.ori(
                arith.cmpi(arith.CmpIPredicate.slt, row, begin), arith.cmpi(arith.CmpIPredicate.sge, row, end)
            )
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [outside, arith.addi(address, mgpu.c(step * WARPGROUP_THREADS * 16, i32)), mgpu.c(0, i32)],
                "@$0 st.shared.v4.b32 [$1], {$2, $2, $2, $2};",
                "b,r,r",
                has_side_effects=True,
            )

    clear(smem, *(jnp.asarray(x, jnp.int32) for x in (begin, end)))
