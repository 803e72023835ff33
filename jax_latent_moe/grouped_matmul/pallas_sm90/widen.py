"""bfloat16 rows x w in codes per expert: a kernel for Hopper that widens codes in registers, on their way to wgmma.

A tile is computed transposed (swap-AB): 64 outputs of a warpgroup by the rows of an expert are w^T x rows^T. So codes
are the operand that wgmma may read from registers, they lie along K there as in memory, and a tile may have as few rows
as 8. tokamax's kernel for quantised weights (ragged_dot, pallas_mosaic_gpu_kernel_sm90_quant.py) does the same.

The codes of a step of K and the rows go through one ring of stages, the scales of a whole tile through another: a few
outputs' scales for all of K are contiguous in memory, and those of one step are too small for TMA.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jax_latent_moe.errors import ConfigError, InputError
from jax_latent_moe.formats import FORMATS, ScaledArray
from jax_latent_moe.formats.fp8 import wide_scales
from jax_latent_moe.grouped_matmul.pallas_sm90 import mgpu as mgpu_code
from jax_latent_moe.grouped_matmul.pallas_sm90 import ptx
from jax_latent_moe.grouped_matmul.pallas_sm90.config import SHARED_MEMORY, PallasWidenTile
from jax_latent_moe.grouped_matmul.pallas_sm90.epilogues import Place, StoreBuffers
from jax_latent_moe.grouped_matmul.pallas_sm90.matmul import WGMMA_ROWS, pad_rows
from jax_latent_moe.grouped_matmul.pallas_sm90.mgpu import COLUMN_BLOCK, CONSUMERS, PRODUCER
from jax_latent_moe.grouped_matmul.pallas_sm90.schedule import ROW_ALIGNMENT, in_bands, row_tiles
from jax_latent_moe.grouped_matmul.pallas_sm90.tiles import widen_bytes
from jax_latent_moe.grouped_matmul.pallas_sm90.widening import WIDENINGS, aligned_lines, lines, widened
from jax_latent_moe.grouped_matmul.pallas_sm90.words import STEP

LINE = 64
"""Bytes of one line of scales."""
MAX_BOX = 256
"""Lines that one TMA load takes."""
SCALE_DTYPES = {1: "uint8", 2: "bfloat16"}
"""The dtypes of scales in rings, by bytes."""


def matmul_widened(
    rows: Float[Array, "r k"],
    w: ScaledArray,
    group_sizes: Int[Array, " e"],
    *,
    tile: PallasWidenTile,
    num_sms: int,
    interpret=None,
) -> Float[Array, "r n"]:
    """rows[R,K] x w[e] -> [R,N] for the rows of each expert.

    Args:
        rows: [R, K], bfloat16, sorted by expert. K is a multiple of 128, or of 64 in the interpreter. N and the columns
            of each part of w are multiples of 64.
        w: [E, K, N] in a format of `WIDENINGS`.
        group_sizes: [E], on the device.
        tile: tile shape and schedule.
        num_sms: SMs to run on.
        interpret: parameters of Pallas' GPU interpreter, to run on a CPU.

    Returns:
        [R, N] in the dtype of rows, accumulated in float32. Rows beyond sum(group_sizes) are zero.

    Raises:
        ConfigError: the tile does not fit the shared memory.
        InputError: scales are not of the dtype that the format stores, or a part of w has another number of columns.
    """
    how, (num_rows, k) = WIDENINGS[w.format], rows.shape
    experts, parts, n, _ = w.codes.shape
    width, blocks, native = parts * n, tile.features // WGMMA_ROWS, interpret is not None
    _check_fits(tile, how, k)
    if n % WGMMA_ROWS and (how.block or how.outer == "tensor"):
        raise InputError(
            f"each of the {parts} parts of w has {n} columns, not a multiple of {WGMMA_ROWS}, and a scale of its own: "
            "pad them, or use XlaBackend()."
        )
    rings = {name: _lines_of(w, name, size) for name, size in how.item_bytes}
    loads = sum(blocks * pl.cdiv(count, MAX_BOX) for count in lines(how, k).values())
    codes = lax.bitcast_convert_type(w.codes, jnp.uint8).reshape(experts, width, -1)
    swizzle = how.step_bytes()
    kernel = functools.partial(
        _kernel,
        format=w.format,
        n=n,
        width=width,
        k=k,
        tile=tile,
        sms=num_sms,
        native=native,
        names=tuple(rings),
    )
    code_transforms = (
        plgpu.TilingTransform((mgpu_code.SWIZZLE_ROWS, swizzle)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    scratch_types = [
        plgpu.SMEM((tile.stages, tile.features, swizzle), jnp.uint8, transforms=code_transforms),
        plgpu.SMEM((tile.stages, tile.rows, STEP), rows.dtype, transforms=mgpu_code.swizzled(rows.dtype)),
        plgpu.SMEM(
            (CONSUMERS, tile.store_buffers, tile.rows, COLUMN_BLOCK),
            rows.dtype,
            transforms=mgpu_code.swizzled(rows.dtype),
        ),
        plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.stages),
        *(
            plgpu.SMEM((tile.scale_buffers, blocks, aligned_lines(how, k)[name], ring.shape[1]), ring.dtype)
            for name, ring in rings.items()
        ),
    ]
    if rings:
        scratch_types += [
            plgpu.Barrier(num_arrivals=loads, num_barriers=tile.scale_buffers),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.scale_buffers),
        ]
    if native:
        scratch_types.append(plgpu.SMEM((CONSUMERS, WGMMA_ROWS, STEP), rows.dtype))
    factors = _factors(w, how)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, width), rows.dtype),
        scratch_types=scratch_types,
        interpret=interpret,
        **mgpu_code.launch(num_sms, 1),
    )(*row_tiles(group_sizes, num_rows, tile.rows), pad_rows(rows), codes, factors, *rings.values())


def _check_fits(tile, how, k):
    used = widen_bytes(tile, how, k)
    if used > SHARED_MEMORY:
        raise ConfigError(
            f"{tile!r} takes {used} bytes of shared memory with the scales of K={k}, more than {SHARED_MEMORY}: lower "
            f"stages={tile.stages}, scale_buffers={tile.scale_buffers} or rows={tile.rows}."
        )


def _lines_of(w, name, size):
    """An array of scales as lines of 64 bytes."""
    array, dtype = w.scales[name], SCALE_DTYPES[size]
    if array.dtype != dtype:
        raise InputError(
            f"scales[{name!r}] of {w.format} are {array.dtype}, not {dtype}: convert them, or decode "
            "the weight with XlaBackend()."
        )
    return array.reshape(-1, LINE // size)


def _factors(w, how):
    """The float32 scales outside of the rings: [E, P] of matrices, [E, P N] of outputs, or [E, P, NB, KB] of blocks."""
    if how.block:
        return wide_scales(w.scales)
    if how.outer is None:
        return jnp.zeros((1, 1), jnp.float32)
    return w.scales[how.outer].astype(jnp.float32).reshape(w.codes.shape[0], -1)


def _kernel(table, counts, rows, codes, factors, *refs, format, n, width, k, tile, sms, native, names):
    """A producer warpgroup fills the rings; each of two consumers widens and multiplies half of a tile's outputs."""
    how = WIDENINGS[format]
    rings, (out, code_smem, row_smem, out_smem, filled, freed, *refs) = refs[: len(names)], refs[len(names) :]
    scale_smem, refs = refs[: len(names)], refs[len(names) :]
    scales_filled, scales_freed = refs[:2] if names else (filled, freed)  # not used without rings
    warpgroup, sm = lax.axis_index("wg"), lax.axis_index("cluster_grid")
    own_blocks = tile.features // WGMMA_ROWS // CONSUMERS
    column_tiles, steps = pl.cdiv(width, tile.features), pl.cdiv(k, STEP)
    expert_tiles = counts[0]
    my_tiles = lax.div(expert_tiles * column_tiles - sm + (sms - 1), sms)

    def locate(i):
        """Row tile and first column of the i-th tile."""
        row_tile, column = in_bands(sm + i * sms, tile.band, expert_tiles, column_tiles)
        return row_tile, column * tile.features

    def place_of(row_tile, column):
        """The part of a tile that a consumer computes and stores."""
        column += warpgroup * (own_blocks * WGMMA_ROWS)
        return Place(table[1, row_tile], column, table[2, row_tile], table[3, row_tile], tile.rows)

    @pl.when(warpgroup == PRODUCER)
    def _produce():
        plgpu.set_max_registers(mgpu_code.PRODUCER_REGISTERS, action="decrease")

        def wait_until_read(barrier):
            """Consumers have read codes and scales by ordinary loads. The fence orders TMA's writes after them."""
            plgpu.barrier_wait(barrier)
            plgpu.commit_smem()

        def load_scales(i, expert, column):
            buffer = lax.rem(i, tile.scale_buffers)
            wait_until_read(scales_freed.at[buffer])
            for ring, smem, count in zip(rings, scale_smem, lines(how, k).values(), strict=True):
                for block in range(tile.features // WGMMA_ROWS):
                    # Blocks beyond the last output read other scales, and are not stored.
                    output = expert * width + jnp.minimum(column + block * WGMMA_ROWS, width - WGMMA_ROWS)
                    first = lax.div(output, WGMMA_ROWS) * count
                    for start in range(0, count, MAX_BOX):
                        size = min(MAX_BOX, count - start)
                        plgpu.copy_gmem_to_smem(
                            ring.at[pl.ds(first + start, size)],
                            smem.at[buffer, block, pl.ds(start, size)],
                            scales_filled.at[buffer],
                        )

        def load_tile(i, buffer):
            row_tile, column = locate(i)
            expert, row = table[0, row_tile], pl.multiple_of(table[1, row_tile], ROW_ALIGNMENT)
            if names:
                load_scales(i, expert, column)

            def step(k, buffer):
                wait_until_read(freed.at[buffer])
                full, depth = filled.at[buffer], how.step_bytes()
                plgpu.copy_gmem_to_smem(
                    codes.at[expert, pl.ds(pl.multiple_of(column, WGMMA_ROWS), tile.features), pl.ds(k * depth, depth)],
                    code_smem.at[buffer],
                    full,
                )
                plgpu.copy_gmem_to_smem(
                    rows.at[pl.ds(row, tile.rows), pl.ds(k * STEP, STEP)], row_smem.at[buffer], full
                )
                return mgpu_code.next_stage(buffer, tile.stages)

            return lax.fori_loop(0, steps, step, buffer)

        mgpu_code.drain(freed, tile.stages, lax.fori_loop(0, my_tiles, load_tile, jnp.int32(0)))

    @pl.when(warpgroup < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(mgpu_code.CONSUMER_REGISTERS, action="increase")
        mgpu_code.free_all(freed, tile.stages, warpgroup < CONSUMERS)
        if names:
            mgpu_code.free_all(scales_freed, tile.scale_buffers, warpgroup < CONSUMERS)
        buffers = StoreBuffers(out_smem.at[warpgroup], own_blocks, width, native=native)
        make = functools.partial(_widen_native if native else _widen, format, k)

        def last_inside(place, block):
            """The column at which a block begins. Those beyond the last column are not stored."""
            return jnp.minimum(place.block(block), width - WGMMA_ROWS)

        def outer_factors(expert, place):
            """The factors of each block's sums: None, a scalar, or a number for each output."""
            if how.outer is None:
                return [None] * own_blocks
            found = []
            for block in range(own_blocks):
                column = last_inside(place, block)
                if how.outer == "tensor":
                    found.append(factors[expert, lax.div(column, n)])
                else:
                    own = factors.at[expert, pl.ds(pl.multiple_of(column, WGMMA_ROWS), WGMMA_ROWS)]
                    found.append(plgpu.load(own, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False))
            return found

        def block_factors(expert, place, k):
            """The scale of each block of 64 outputs in a step, read a step ahead of its use."""
            if not how.block:
                return []
            found = []
            for block in range(own_blocks):
                column = last_inside(place, block)
                part = lax.div(column, n)
                found.append(factors[expert, part, lax.div(column - part * n, STEP), k])
            return found

        def one_tile(i, buffer):
            row_tile, column = locate(i)
            expert, place = table[0, row_tile], place_of(row_tile, column)
            outer, scale_buffer = outer_factors(expert, place), lax.rem(i, tile.scale_buffers)
            if names:
                plgpu.barrier_wait(scales_filled.at[scale_buffer])

            def multiply(*sums):
                def one(step, buffer, block_scales):
                    plgpu.barrier_wait(filled.at[buffer])
                    for block in range(own_blocks):
                        index = warpgroup * own_blocks + block
                        own = code_smem.at[buffer, pl.ds(pl.multiple_of(index * WGMMA_ROWS, WGMMA_ROWS), WGMMA_ROWS)]
                        scales = {
                            name: smem.at[scale_buffer, index] for name, smem in zip(names, scale_smem, strict=True)
                        }
                        a = make(own, scales, step, *block_scales[block : block + 1])
                        if native:
                            refs[-1][warpgroup] = a
                            a = refs[-1].at[warpgroup]
                        plgpu.wgmma(sums[block], a, row_smem.at[buffer].transpose((1, 0)))
                        # Without this wait, codes were widened into registers that wgmma was still reading.
                        plgpu.wgmma_wait(0)

                def step(k, carry):
                    buffer, block_scales = carry
                    following = block_factors(expert, place, jnp.minimum(k + 1, steps - 1))
                    after = mgpu_code.next_stage(buffer, tile.stages)
                    one(k, after, block_scales)
                    plgpu.barrier_arrive(freed.at[buffer])
                    return after, following

                following = block_factors(expert, place, min(1, steps - 1))
                one(0, buffer, block_factors(expert, place, 0))
                last, _ = lax.fori_loop(1, steps, step, (buffer, following))
                return *(total[...] for total in sums), last

            *sums, last = pl.run_scoped(
                multiply, *(plgpu.ACC((WGMMA_ROWS, tile.rows), jnp.float32) for _ in range(own_blocks))
            )
            plgpu.barrier_arrive(freed.at[last])
            if names:
                plgpu.barrier_arrive(scales_freed.at[scale_buffer])
            _store(buffers, place, out, sums, outer)
            return mgpu_code.next_stage(last, tile.stages)

        lax.fori_loop(0, my_tiles, one_tile, jnp.int32(0))

        # Padding rows get zeros.
        @pl.loop(sm, (counts[1] - expert_tiles) * column_tiles, step=sms)
        def _zero_tile(i):
            row_tile, column = expert_tiles + lax.div(i, column_tiles), lax.rem(i, column_tiles) * tile.features
            zeros = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, tile.rows), jnp.float32), plgpu.Layout.WGMMA)
            _store(buffers, place_of(row_tile, column), out, [zeros] * own_blocks, [None] * own_blocks)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store(buffers, place, out, sums, factors):
    """Stores each block of sums [64 outputs, rows], times its factors, as rows [rows, 64]."""
    for block, (total, factor) in enumerate(zip(sums, factors, strict=True)):
        buffer = block % buffers.count
        if factor is not None:
            total *= factor if factor.ndim == 0 else lax.broadcast_in_dim(factor, total.shape, (0,))
        value = total.astype(out.dtype)
        plgpu.wait_smem_to_gmem(min(block, buffers.count - 1), wait_read_only=True)
        if buffers.native:
            buffers.smem[buffer] = value.T
        else:
            target = buffers.smem.at[buffer].transpose((1, 0))
            target[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        buffers.send(buffer, place, block, out, place.block(block))


def _widen(format, k, codes, scales, step, *block_scale):
    """The operand [64, 128] of a step as bfloat16 in registers."""
    how, names = WIDENINGS[format], tuple(scales)
    layout = plgpu.Layout.WGMMA_8BIT if how.packing == 2 else plgpu.Layout.WGMMA_UPCAST_2X
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(
        arg_types=(layout, scalar, *(plgpu.RefType() for _ in names), *(scalar for _ in block_scale)),
        return_type=plgpu.ShapeDtypeStruct((WGMMA_ROWS, STEP), jnp.dtype("bfloat16"), layout=plgpu.Layout.WGMMA),
    )
    def widen(ctx, codes, step, *refs):
        del ctx
        memories = {name: ptx.memory_of(ref) for name, ref in zip(names, refs, strict=False)}
        block = ptx.word_of(refs[len(names)]) if block_scale else None
        words = widened(ptx.Ptx(), how, ptx.words_of(codes), memories, k, ptx.word_of(step), block)
        return ptx.array_of(words, (WGMMA_ROWS, STEP), jnp.bfloat16)

    loaded = plgpu.load(codes, layout=layout)
    return widen(loaded, jnp.asarray(step, jnp.int32), *scales.values(), *block_scale)


def _widen_native(format, k, codes, scales, step, *block_scale):
    """The same by the format's own decoding, for the interpreter."""
    how = WIDENINGS[format]
    found = {}
    for name, count in lines(how, k).items():
        array = scales[name][...][:count].reshape(WGMMA_ROWS, -1)
        count, total = STEP // (how.group or k), array.shape[1]
        padded = jnp.pad(array, ((0, 0), (0, -total % count)), mode="edge")
        found[name] = lax.dynamic_slice_in_dim(padded, step * count, count, axis=1)
    if how.outer is not None:
        found[how.outer] = jnp.ones((1, 1), jnp.float32)
    if how.block:
        found["block"] = block_scale[0].reshape(1, 1)
    stored = codes[...]
    stored = lax.bitcast_convert_type(stored, jnp.int8) if format == "int8" else stored
    return FORMATS[format].decode(stored, found, jnp.bfloat16)
