"""The kernels of norms and rotations, in Pallas' interpreter and lowered for a GPU."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from examples.train import fused_norm, row_kernels
from examples.train.attention import normalise_and_rotate, rotary_table
from examples.train.errors import TrainError
from examples.train.hardware import why_no_nvidia_gpu
from examples.train.initialising import shapes
from examples.train.model import language_model
from examples.train.norm import rms_norm
from examples.train.placing import batch_sharding, make_mesh
from examples.train.presets import TOY
from tests.tolerances import assert_close, assert_trees_close

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
    """Heads [..., time, heads, width] as complex numbers, turned by the angles of their positions."""
    half = x.shape[-1] // 2
    angle = sign * positions[:, None, None] / 10_000 ** (np.arange(half) / half)
    y = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([y.real, y.imag], axis=-1)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 7, 3, 6), "float32"),
        ((1, 17, 1, 48), "float32"),
        ((2, 32, 6, 128), "bfloat16"),
        ((1, 8, 2, 512), "bfloat16"),
    ],
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


SMALL = dataclasses.replace(
    TOY, mlp="dense", model=dataclasses.replace(TOY.model, layers=2, context=8), scan_layers=True
)


@functools.cache
def loss_and_gradients(norms, mesh, remat):
    """The loss of a batch and the gradients of all parameters."""
    config, drawn = dataclasses.replace(SMALL, norms=norms, remat=remat), np.random.default_rng(0)
    model, mesh = language_model(config), make_mesh(mesh, 4)
    params = nn.unbox(shapes(model))["params"]
    params = jax.tree.map(lambda leaf: drawn.normal(size=leaf.shape).astype(np.float32) / 4, params)
    tokens = drawn.integers(0, 256, (4, SMALL.model.context))

    def loss(params, tokens):
        return model.apply({"params": params}, tokens, targets=tokens, weights=jnp.ones(tokens.shape) / tokens.size)

    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(loss))(params, jax.device_put(tokens, batch_sharding(mesh)))


def add_norm(*arrays, interpret):
    """`row_kernels.add_norm` by XLA: the interpreter runs neither in a scan nor under recomputation."""
    *terms, scale = arrays
    total = sum(terms)
    return *(total,) * (len(terms) - 1), rms_norm(total, scale)


def add_norm_grad(total, dnormed, *rest, interpret):
    """`row_kernels.add_norm_grad` by XLA."""
    *straight, scale = rest
    dx, dscale = jax.vjp(rms_norm, total, scale)[1](dnormed)
    return sum(straight, dx), dscale[None]


def norm_rotate(x, scale, cos, sin, *, interpret):
    """`row_kernels.norm_rotate` by XLA."""
    table = cos[:, None, None], jnp.stack([-sin, sin], axis=1)[:, None]
    return normalise_and_rotate(x, scale, table)


def norm_rotate_grad(x, gradient, scale, cos, sin, *, interpret):
    """`row_kernels.norm_rotate_grad` by XLA."""
    run = functools.partial(norm_rotate, cos=cos, sin=sin, interpret=interpret)
    dx, dscale = jax.vjp(run, x, scale)[1](gradient)
    return dx, dscale[None]


@pytest.mark.parametrize(("remat", "mesh"), [("none", "data=2,fsdp=2"), ("layer", "")])
def test_a_model_with_the_kernels_has_the_loss_and_gradients_of_one_without(monkeypatch, remat, mesh):
    """A block and a scanned one. Without recomputation, the norm of the next block adds the output of a block."""
    for kernel in (add_norm, add_norm_grad, norm_rotate, norm_rotate_grad):
        monkeypatch.setattr(row_kernels, kernel.__name__, kernel)
    monkeypatch.setattr(fused_norm, "why_no_nvidia_gpu", lambda *capabilities: None)
    loss, gradients = loss_and_gradients("pallas", mesh, remat)
    wanted, expected = loss_and_gradients("xla", "", "none")
    assert_close(loss, wanted, "float32")
    assert_trees_close(gradients, expected, "float32")


def test_norms_are_chosen_for_the_machine(monkeypatch):
    assert fused_norm.choose_norms("auto", TOY.model) == "xla"
    with pytest.raises(TrainError, match=r"--norms pallas cannot run: it needs an NVIDIA GPU, and JAX computes on cpu"):
        fused_norm.choose_norms("pallas", TOY.model)
    monkeypatch.setattr(fused_norm, "why_no_nvidia_gpu", lambda *capabilities: None)
    assert fused_norm.choose_norms("auto", TOY.model) == "pallas"
    assert fused_norm.choose_norms("xla", TOY.model) == "xla"
    wide = dataclasses.replace(TOY.model, hidden_size=8192)
    assert fused_norm.choose_norms("auto", wide) == "xla"
    with pytest.raises(TrainError, match=r"model\.hidden_size is 8192, more than 4096"):
        fused_norm.choose_norms("pallas", wide)


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "reason"),
    [
        ("gpu", "H200", "9.0", None),
        ("gpu", "A100", "8.0", "it needs compute capability 9.0 to under 10.0, and A100 has 8.0"),
        ("gpu", "B200", "10.0", "it needs compute capability 9.0 to under 10.0, and B200 has 10.0"),
        ("gpu", "MI300", "gfx942", "it needs compute capability 9.0 to under 10.0, and MI300 has gfx942"),
        ("tpu", "v5", None, "it needs an NVIDIA GPU, and JAX computes on v5"),
    ],
)
def test_the_reason_names_what_a_device_lacks(monkeypatch, platform, kind, capability, reason):
    device = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert why_no_nvidia_gpu(9.0, 10.0) == reason


@pytest.mark.parametrize("d", [1024, 2048])
def test_a_step_on_a_gpu_has_one_kernel_for_each_norm_and_direction(d):
    """The sizes of the presets lower for a GPU, in bfloat16."""
    x, heads = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 64, d), (2, 64, 8, d // 8)))
    scale, scale_of_head = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (d, d // 8))
    table = jax.ShapeDtypeStruct((64, d // 16), jnp.bfloat16)

    def run(x, delta, scale, heads, scale_of_head, cos, sin):
        outputs, pull = jax.vjp(functools.partial(fused_norm.add_norm, keep=True), x, delta, scale)
        rotated, pull_rotated = jax.vjp(fused_norm.norm_rotate, heads, scale_of_head, cos, sin)
        return pull(outputs), pull_rotated(rotated)

    lowered = jax.jit(run).trace(x, x, scale, heads, scale_of_head, table, table).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") == 4
