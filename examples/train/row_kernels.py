"""RMSNorm of rows as Pallas kernels for Hopper: after a residual sum, and before a rotary rotation. One pass each.

XLA reads the inputs of a norm's gradient twice: once for two sums over each row, once for the result. These kernels
keep a row in registers between the two. They compute in float32. They write the gradient of the scale as one partial
sum for each block, so that the total has a fixed order.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from examples.train.norm import EPSILON

LARGEST_WIDTH = 4096
"""The widest row that fits into the registers of a block, with its gradients."""
WARPS, LANES = 4, 32
THREADS = WARPS * LANES
VECTOR = 4
"""The most consecutive elements of a thread: Pallas loads 16 bytes of float32 at once, and sums so many over warps."""
ELEMENTS = 32
"""Elements of one array that a thread holds at a time, as far as whole rows allow."""
SCRATCH_BYTES = 4 * THREADS * VECTOR
"""Shared memory for sums over warps."""
STEPS = 8
"""Tiles of a block in the backward pass of `add_norm`. More of them make fewer partial sums."""
HALF_ELEMENTS = 8
"""Elements of half of a head's tile that a thread holds in `norm_rotate`, as far as whole rows allow."""
HEADS = 4
"""The most heads of a block in `norm_rotate`."""


@functools.partial(jax.jit, static_argnames="interpret")
def add_norm(*arrays: Array, interpret=None) -> tuple[Array, ...]:
    """The sum of x and delta [..., d] in their dtype, and its RMSNorm times scale.

    Args:
        arrays: x, delta and scale [d]. Without delta, x is normalised.
        interpret: parameters of Pallas' GPU interpreter, to run on a CPU.

    Returns:
        The sum, unless delta is left out, and the norm.
    """
    *terms, scale = arrays
    like, added = terms[0], len(terms) - 1
    d = like.shape[-1]
    padded, rows, layout = _rows(terms)

    def add_norm_kernel(*refs):
        inputs, (scale, *outputs) = refs[: 1 + added], refs[1 + added :]
        at = pl.ds(lax.axis_index("block") * rows, rows)
        total, *delta = (_load(ref.at[at], layout) for ref in inputs)
        if added:
            stored = (total + delta[0]).astype(like.dtype)
            outputs[0][at] = stored
            total = stored.astype(jnp.float32)
        root = lax.rsqrt(jnp.sum(jnp.square(total), axis=1) / d + EPSILON)
        normed = total * _along_rows(root, total) * _along_columns(_load(scale, layout.reduce(0)), total)
        outputs[-1][at] = normed.astype(like.dtype)

    out = jax.ShapeDtypeStruct(padded[0].shape, like.dtype)
    call = _kernel(add_norm_kernel, [out] * (1 + added), interpret, block=out.shape[0] // rows)
    return tuple(_unpadded(output, like) for output in call(*padded, _wide(scale)))


@functools.partial(jax.jit, static_argnames="interpret")
def add_norm_grad(*arrays: Array, interpret=None) -> tuple[Float[Array, "*batch d"], Float[Array, "blocks d"]]:
    """The gradients of `add_norm`: the gradient of x, which is also delta's, and partial sums of the scale's.

    Args:
        arrays: the sum [..., d], the norm's gradient, the gradient that reaches the sum by other ways, and scale [d].
            The third can be left out.
        interpret: parameters of Pallas' GPU interpreter, to run on a CPU.
    """
    *split, scale = arrays
    like, count = split[0], len(split)
    d = like.shape[-1]
    padded, rows, layout = _rows(split)
    num_rows, width = padded[0].shape
    steps = math.gcd(num_rows // rows, STEPS)

    def add_norm_grad_kernel(*refs):
        inputs, (scale, dx, dscale) = refs[:count], refs[count:]
        block = lax.axis_index("block")
        factor = _load(scale, layout.reduce(0))

        def step(i, summed):
            at = pl.ds((block * steps + i) * rows, rows)
            wide, gradient, *straight = (_load(ref.at[at], layout) for ref in inputs)
            scaled = gradient * _along_columns(factor, wide)
            root = lax.rsqrt(jnp.sum(jnp.square(wide), axis=1) / d + EPSILON)
            along = jnp.sum(scaled * wide, axis=1) / d * root
            root, along = _along_rows(root, wide), _along_rows(along, wide)
            normed = wide * root
            out = root * (scaled - normed * along)
            for other in straight:
                out += other
            dx[at] = out.astype(like.dtype)
            return summed + jnp.sum(gradient * normed, axis=0)

        zero = plgpu.layout_cast(jnp.zeros(factor.shape, jnp.float32), layout.reduce(0))
        dscale[block] = lax.fori_loop(0, steps, step, zero)

    blocks = num_rows // rows // steps
    outs = jax.ShapeDtypeStruct(padded[0].shape, like.dtype), jax.ShapeDtypeStruct((blocks, width), jnp.float32)
    dx, dscale = _kernel(add_norm_grad_kernel, outs, interpret, block=blocks)(*padded, _wide(scale))
    return _unpadded(dx, like), dscale[:, :d]


@functools.partial(jax.jit, static_argnames="interpret")
def norm_rotate(
    x: Float[Array, "batch time heads width"],
    scale: Float[Array, " width"],
    cos: Float[Array, "time half"],
    sin: Float[Array, "time half"],
    *,
    interpret=None,
) -> Float[Array, "batch time heads width"]:
    """The RMSNorm of each head times scale, rotated: pairs of features of the two halves turn by the table's angles."""
    (padded, cos, sin), rows, layout, grid = _positions(x, cos, sin)
    width, heads = x.shape[-1], x.shape[2] // grid["group"]

    def norm_rotate_kernel(x, scale, cos, sin, y):
        positions, parts = pl.ds(lax.axis_index("block") * rows, rows), _halves(width)
        cos, sin = (_load(table.at[positions], layout) for table in (cos, sin))
        factors = [_along_columns(_load(scale.at[part], layout.reduce(0)), cos) for part in parts]

        @pl.loop(0, heads)
        def _(i):
            place = lax.axis_index("batch"), positions, lax.axis_index("group") * heads + i
            tile = [_load(x.at[(*place, part)], layout) for part in parts]
            root = _along_rows(lax.rsqrt(_sum_of_squares(tile) / width + EPSILON), cos)
            first, second = (part * root * factor for part, factor in zip(tile, factors, strict=True))
            y[(*place, parts[0])] = (first * cos - second * sin).astype(y.dtype)
            y[(*place, parts[1])] = (second * cos + first * sin).astype(y.dtype)

    out = jax.ShapeDtypeStruct(padded.shape, x.dtype)
    (y,) = _kernel(norm_rotate_kernel, [out], interpret, **grid)(padded, scale.astype(jnp.float32), cos, sin)
    return y[:, : x.shape[1]]


@functools.partial(jax.jit, static_argnames="interpret")
def norm_rotate_grad(
    x: Float[Array, "batch time heads width"],
    gradient: Float[Array, "batch time heads width"],
    scale: Float[Array, " width"],
    cos: Float[Array, "time half"],
    sin: Float[Array, "time half"],
    *,
    interpret=None,
) -> tuple[Float[Array, "batch time heads width"], Float[Array, "batch blocks groups width"]]:
    """The gradients of `norm_rotate`: the gradient of x, and partial sums of the scale's."""
    (padded, gradient, cos, sin), rows, layout, grid = _positions(x, gradient, cos, sin)
    width, heads = x.shape[-1], x.shape[2] // grid["group"]

    def norm_rotate_grad_kernel(x, gradient, scale, cos, sin, dx, dscale):
        positions, parts = pl.ds(lax.axis_index("block") * rows, rows), _halves(width)
        batch, block, group = (lax.axis_index(name) for name in ("batch", "block", "group"))
        cos, sin = (_load(table.at[positions], layout) for table in (cos, sin))
        factors = [_along_columns(_load(scale.at[part], layout.reduce(0)), cos) for part in parts]

        def head(i, sums):
            place = batch, positions, group * heads + i
            tile, dtile = ([_load(ref.at[(*place, part)], layout) for part in parts] for ref in (x, gradient))
            back = dtile[0] * cos + dtile[1] * sin, dtile[1] * cos - dtile[0] * sin
            root = _along_rows(lax.rsqrt(_sum_of_squares(tile) / width + EPSILON), cos)
            normed = [part * root for part in tile]
            scaled = [part * factor for part, factor in zip(back, factors, strict=True)]
            along = jnp.sum(scaled[0] * normed[0] + scaled[1] * normed[1], axis=1) / width
            along = _along_rows(along, cos)
            for i, part in enumerate(parts):
                dx[(*place, part)] = (root * (scaled[i] - normed[i] * along)).astype(dx.dtype)
            return tuple(summed + b * n for summed, b, n in zip(sums, back, normed, strict=True))

        zero = plgpu.layout_cast(jnp.zeros(cos.shape, jnp.float32), layout)
        for part, values in zip(parts, lax.fori_loop(0, heads, head, (zero, zero)), strict=True):
            dscale[batch, block, group, part] = jnp.sum(values, axis=0)

    outs = jax.ShapeDtypeStruct(padded.shape, x.dtype), jax.ShapeDtypeStruct((*grid.values(), width), jnp.float32)
    call = _kernel(norm_rotate_grad_kernel, outs, interpret, **grid)
    dx, dscale = call(padded, gradient, scale.astype(jnp.float32), cos, sin)
    return dx[:, : x.shape[1]], dscale


def _kernel(body, out_type, interpret, **grid):
    """A kernel on a grid with named axes, of one warpgroup in each block."""
    return plgpu.kernel(
        body,
        out_type=tuple(out_type),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=SCRATCH_BYTES),
        interpret=interpret,
    )


def _load(ref, layout):
    """The values of a ref in GPU memory, as float32 in registers."""
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def _along_rows(values, like):
    return lax.broadcast_in_dim(values, like.shape, (0,))


def _along_columns(values, like):
    return lax.broadcast_in_dim(values, like.shape, (1,))


def _sum_of_squares(halves):
    return jnp.sum(jnp.square(halves[0]) + jnp.square(halves[1]), axis=1)


def _rows(arrays):
    """The arrays as rows and columns padded to whole tiles, the rows of a tile, and its layout.

    All four warps share each row, so a thread holds few columns of the scale and its gradient.
    """
    arrays = [_wide(array.reshape(-1, array.shape[-1])) for array in arrays]
    a_thread = arrays[0].shape[1] // THREADS
    vector = math.gcd(a_thread, VECTOR)
    rows = 1 << max(1, (ELEMENTS // a_thread).bit_length() - 1)
    layout = _layout((1, THREADS * vector), (1, LANES * vector), (1, vector), warps=(-5,), lanes=(-3,))
    return [_padded(array, 0, rows) for array in arrays], rows, layout


def _wide(array):
    """Columns padded to a multiple of the threads of a block. Zeros change no sum."""
    return _padded(array, -1, THREADS)


def _unpadded(rows, like):
    return rows[: math.prod(like.shape[:-1]), : like.shape[-1]].reshape(like.shape)


def _positions(*arrays):
    """The arrays with positions padded to whole tiles, the positions of a tile, its layout, and the grid.

    A tile is half of a head at consecutive positions. They are the second axis of x and its gradient, and the first of
    the table. Lanes share each row, so no sum over a row leaves a warp.
    """
    x, half = arrays[0], arrays[-1].shape[-1]
    columns = math.gcd(half, LANES * VECTOR)
    vector = min(columns, VECTOR)
    a_warp = LANES * vector // columns
    layout = _layout((WARPS * a_warp, columns), (a_warp, columns), (1, vector), warps=(-6,), lanes=(-4, -3))
    rows = WARPS * a_warp * max(1, HALF_ELEMENTS * THREADS // (half * WARPS * a_warp))
    padded = [_padded(array, 1 if array.ndim == 4 else 0, rows) for array in arrays]
    grid = dict(batch=x.shape[0], block=padded[0].shape[1] // rows, group=x.shape[2] // math.gcd(x.shape[2], HEADS))
    return padded, rows, layout, grid


def _halves(width):
    return pl.ds(0, width // 2), pl.ds(width // 2, width // 2)


@functools.cache
def _layout(tile, of_warp, of_thread, warps, lanes):
    """The layout of a tile: its four warps, the lanes of a warp, and the consecutive elements of a thread."""
    layout = TiledLayout(Tiling((tile, of_warp, of_thread)), warps, lanes, -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def _padded(array, axis, multiple):
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths)
