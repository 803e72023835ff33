"""The kernels of norms and rotations, in Pallas' interpreter and lowered for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from examples.train import fused_norm, row_kernels
from examples.train.attention import rotary_table
from examples.train.errors import TrainError
from tests.examples.runs import TOY
from tests.tolerances import assert_close

EPSILON = 1e-6


@pytest.fixture
def interpreter(monkeypatch):
    """The kernels run in the interpreter; no race may have been found when the test ends."""
    monkeypatch.setattr(fused_norm, "INTERPRET", plgpu.InterpretGPUParams(detect_races=True))
    yield
    assert not gpu_callbacks.get_races().races_found


def norm_and_gradients(x, scale, gradient):
    """RMSNorm, and the gradients of x and scale, in float64."""
    root = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON)
    along = np.mean(gradient * scale * x, axis=-1, keepdims=True)
    dx = root * gradient * scale - x * root**3 * along
    return x * root * scale, dx, np.sum(gradient * x * root, axis=tuple(range(x.ndim - 1)))


def of_dtype(rng, dtype, *shapes):
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 5, 20), "float32"), ((1, 1, 256), "bfloat16"), ((3, 32, 128), "bfloat16"), ((1, 3, 4096), "bfloat16")],
)
def test_norm_after_a_sum(rng, interpreter, shape, dtype, added, keep):
    """One row, rows and columns that no tile divides, several blocks, the widest row."""
    x, delta, dtotal, dnormed = of_dtype(rng, dtype, shape, shape, shape, shape)
    (scale,) = of_dtype(rng, "float32", shape[-1:])
    arguments = (x, delta if added else None, scale)

    def run(*arguments):
        (total, normed), pull = jax.vjp(functools.partial(fused_norm.add_norm, keep=keep), *arguments)
        return total, normed, pull((dtotal if keep else None, dnormed))

    total, normed, (dx, ddelta, dscale) = jax.jit(run)(*arguments)
    stored = np.float64(x + delta if added else x)
    expected, wanted_dx, wanted_dscale = norm_and_gradients(stored, np.float64(scale), np.float64(dnormed))
    if keep:
        np.testing.assert_array_equal(np.float64(total), stored)
        wanted_dx += np.float64(dtotal)
    else:
        assert total is None
    assert normed.dtype == dx.dtype == jnp.dtype(dtype)
    assert_close(normed, expected, dtype)
    assert_close(dx, wanted_dx, dtype)
    assert_close(dscale, wanted_dscale, "float32")
    assert (ddelta is None) == (not added)
    if added:
        np.testing.assert_array_equal(np.float64(ddelta), np.float64(dx))


def rotated(x, positions, sign=1):
    """x [..., time, heads, width] as complex numbers, turned by the angles of their positions."""
    half = x.shape[-1] // 2
    angle = sign * positions[:, None, None] / 10_000 ** (np.arange(half) / half)
    y = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([y.real, y.imag], axis=-1)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 7, 3, 6), "float32"), ((1, 17, 1, 48), "float32"), ((2, 32, 6, 128), "bfloat16"), ((1, 8, 2, 512), "bfloat16")],
)
def test_norm_and_rotation_of_heads(rng, interpreter, shape, dtype):
    """Positions, heads and widths that no tile divides, several blocks, the usual width, a wide head."""
    x, gradient = of_dtype(rng, dtype, shape, shape)
    x = x.at[0, 0, 0].set(0)
    (scale,) = of_dtype(rng, "float32", shape[-1:])
    positions = np.arange(5, 5 + shape[1])
    cos, sin = rotary_table(jnp.asarray(positions), shape[-1], "float32")

    def run(x, scale):
        y, pull = jax.vjp(lambda x, scale: fused_norm.norm_rotate(x, scale, cos[:, 0, 0], sin[:, 0, 1]), x, scale)
        return y, pull(gradient)

    y, (dx, dscale) = jax.jit(run)(x, scale)
    back = rotated(np.float64(gradient), positions, -1)
    normed, wanted_dx, wanted_dscale = norm_and_gradients(np.float64(x), np.float64(scale), back)
    assert y.dtype == dx.dtype == jnp.dtype(dtype)
    assert_close(y, rotated(normed, positions), dtype)
    assert_close(dx, wanted_dx, dtype)
    assert_close(dscale, wanted_dscale, "float32")
