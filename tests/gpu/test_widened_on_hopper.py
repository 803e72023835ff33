"""The compiled kernels that widen codes on a Hopper GPU, against a float64 oracle on decoded weights."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import CutlassBackend, XlaBackend, init_params, latent_moe, quantize
from jax_latent_moe.formats import FORMATS, ScaledArray, encode
from jax_latent_moe.grouped_matmul import GatheredRows, Operands, grouped_matmul, operand_of, problem, reference
from jax_latent_moe.grouped_matmul.cutlass_sm90 import backend as cutlass
from jax_latent_moe.grouped_matmul.cutlass_sm90.backend import Cutlass
from jax_latent_moe.grouped_matmul.cutlass_sm90.codes import CODES
from jax_latent_moe.grouped_matmul.operands import gathered
from jax_latent_moe.grouped_matmul.registry import bind
from jax_latent_moe.grouped_matmul.sm90 import KERNEL_ACTIVATIONS
from jax_latent_moe.native import library
from tests.gpu.grouped import GROUPS, NUM_ROWS, float64, needs_hopper, same
from tests.kernels import RESIDUAL, epilogue_of, layer_of
from tests.oracle.fused import activation_of_rows, kept_of
from tests.tolerances import RELATIVE, assert_close

pytestmark = [needs_hopper, pytest.mark.skipif(library().missing is not None, reason=f"{library().missing}")]
BACKEND = Cutlass(CutlassBackend(fuse="always"))
# K, rounded up to what a format needs, and N: a part of a step; fewer steps than stages, or more; whole tiles.
FEATURES = [(16, 8), (208, 136), (528, 264), (1024, 384)]
every_format = pytest.mark.parametrize("name", CODES)
of_all_features = pytest.mark.parametrize("features", FEATURES, ids=str)


def k_of(name, k):
    """The least K from k on that a format and the kernels take."""
    format = FORMATS[name]
    multiple = math.lcm(16 * format.packing, format.multiples()[0])
    return -(-k // multiple) * multiple


def drawn(rng, name, sizes, k, n, parts=1, num_rows=NUM_ROWS):
    """Rows with NaN in padding rows, a weight in codes whose scales differ widely, and both in float64."""
    rows, w = rng.normal(size=(num_rows, k)), rng.normal(size=(len(sizes), k, parts * n)) / np.sqrt(k)
    w *= np.repeat(10 ** rng.uniform(-1, 0.3, (len(sizes), k // 16, parts * n)), 16, axis=1)
    rows[np.sum(sizes) :] = np.nan
    rows, w = jnp.asarray(rows, jnp.bfloat16), coded(jnp.asarray(w, jnp.float32), name, parts)
    return rows, w, float64(rows), float64(w.decode("float32"))


@functools.partial(jax.jit, static_argnums=(1, 2))
def coded(w, name, parts):
    return encode(w, name, parts=parts)


@functools.cache
def compiled(bound):
    @jax.jit
    def run(rows, w, sizes):
        outputs = bound(Operands(rows, w, sizes))
        return gathered(outputs.out), outputs.residual

    return run


def runs(rows, w, sizes, epilogue=None):
    """(out, residual), of each compiled tile in either order, on each of two runs with equal bits."""
    lhs, rhs = operand_of(rows), operand_of(w)
    asked = problem("fwd", rows.shape[0], w.shape, "bfloat16", lhs=lhs, rhs=rhs, epilogue=epilogue)
    assert BACKEND.supports(asked) is None
    tiles, sizes = BACKEND.tiles(asked), jnp.asarray(sizes, jnp.int32)
    assert tiles
    for tile in tiles:
        bound = dataclasses.replace(bind(BACKEND, asked), tile=tile)
        run = compiled(dataclasses.replace(bound, in_place=BACKEND.in_place(asked, tile)))
        found = run(rows, w, sizes)
        same(found, run(rows, w, sizes))
        yield found


def check(rng, name, sizes, k, n, parts=1, num_rows=NUM_ROWS):
    rows, w, values, weights = drawn(rng, name, sizes, k, n, parts, num_rows)
    expected = reference.grouped_matmul(values, weights, sizes)
    for out, residual in runs(rows, w, sizes):
        assert residual is None
        assert_close(float64(out), expected, "bfloat16", f"{name}, group sizes {np.asarray(sizes).tolist()}")
        assert not out[np.sum(sizes) :].any()
        if np.sum(sizes) >= 64:  # fewer products may be small by chance
            # Columns whose numbers are small count as much as others.
            error = np.linalg.norm(float64(out) - expected, axis=0) / np.linalg.norm(expected, axis=0)
            assert error.max() <= 2 * RELATIVE["bfloat16"]


@every_format
@of_all_features
def test_products(rng, name, features):
    """Ragged and empty groups, all rows on one expert, one row, padding rows full of NaN."""
    for sizes in GROUPS.values():
        check(rng, name, sizes, k_of(name, features[0]), features[1])


@every_format
def test_gate_and_up_without_an_activation(rng, name):
    """Two matrices side by side, whose scales differ, in tiles that hold columns of both."""
    for n in (200, 256):
        check(rng, name, GROUPS["ragged"], k_of(name, 256), n, parts=2)


@every_format
def test_few_rows_and_deep_products(rng, name):
    for num_rows in (1, 8, 22):
        sizes = rng.multinomial(num_rows, np.full(40, 1 / 40))
        check(rng, name, sizes, k_of(name, 2688), 128, num_rows=num_rows)


@every_format
def test_more_tiles_than_sms(rng, name):
    check(rng, name, rng.multinomial(2500, np.full(40, 1 / 40)), k_of(name, 256), 1032, num_rows=3000)


ACTIVATED = [
    (name, activation) for name in ("fp8_block", "nvfp4", "int4_128_zero") for activation in KERNEL_ACTIVATIONS
]
ACTIVATED += [(name, activation) for name in ("int8", "fp8_tensor", "mxfp4") for activation in ("relu2", "swiglu")]


@pytest.mark.parametrize(("name", "activation"), ACTIVATED)
def test_activations(rng, name, activation):
    """Values of the rounded pre-activation, the residual, and the same values without it."""
    config, epilogue = layer_of(activation), epilogue_of(activation)
    residual, parts = RESIDUAL[activation], 2 if config.gated else 1
    for group, k, n in (("ragged", 256, 192), ("blocks", 528, 72), ("one row", 16, 8), ("none", 64, 128)):
        sizes, k = GROUPS[group], k_of(name, k)
        owned = slice(int(np.sum(sizes)))
        rows, w, values, weights = drawn(rng, name, sizes, k, n, parts)
        expected_pre = reference.grouped_matmul(values, weights, sizes)
        without = dataclasses.replace(epilogue, residual=None)
        found, alone = runs(rows, w, sizes, epilogue), runs(rows, w, sizes, without)
        for (hidden, kept), (hidden_alone, nothing) in zip(found, alone, strict=True):
            assert nothing is None
            same(hidden, hidden_alone)
            if residual == "pre":
                assert_close(float64(kept), expected_pre, "bfloat16", "pre")
            pre = float64(kept) if residual == "pre" else float64(jnp.asarray(expected_pre, jnp.bfloat16))
            assert_close(float64(hidden), activation_of_rows(config, pre)[0], "bfloat16", f"hidden, {group}")
            assert_close(float64(kept)[owned], kept_of(config, pre, residual)[owned], "bfloat16", f"kept, {group}")
            assert not hidden[owned.stop :].any()


@pytest.mark.parametrize("name", ["mxfp4", "int8", "fp8_block"])
@pytest.mark.parametrize("owned", [2500, 3000, 0])
def test_rows_that_the_kernel_gathers_are_those_gathered_before(rng, monkeypatch, name, owned):
    """To the bit, weighted or not, ids outside of the table included; and they are right."""
    monkeypatch.setattr(cutlass, "FEW_PRODUCTS", 0)
    num_rows, experts, tokens, (k, n) = 3000, 40, 90, (k_of(name, 264), 1040)
    sizes = rng.multinomial(owned, rng.dirichlet(np.full(experts, 0.5)))
    table, w, _, weights = drawn(rng, name, np.full(experts, tokens // experts + 1), k, n, num_rows=tokens)
    ids = jnp.asarray(rng.integers(-3, tokens + 3, num_rows), jnp.int32)
    factors = jnp.asarray(rng.normal(size=num_rows), jnp.float32)
    gated = coded(jnp.asarray(weights[:, :, : 2 * 136], jnp.float32), name, 2)
    for weighting in (None, factors):
        rows = GatheredRows(table, ids, weighting)
        there = gathered(rows)
        expected = reference.grouped_matmul(float64(there), weights, sizes)
        for found, before in zip(runs(rows, w, sizes), runs(there, w, sizes), strict=True):
            same(found, before)
            assert_close(float64(found[0]), expected, "bfloat16")
        for activation, weight in (("relu2", w), ("swiglu", gated)):
            fused = epilogue_of(activation)
            for found, before in zip(runs(rows, weight, sizes, fused), runs(there, weight, sizes, fused), strict=True):
                same(found, before)


@pytest.mark.parametrize("k", [256, 208])
@every_format
def test_a_scale_that_is_nan_spoils_its_own_values_alone(rng, name, k):
    """Those of one expert, and of the outputs that have the scale. A step may end behind the contracted axis."""
    sizes, k = GROUPS["ragged"], k_of(name, k)
    rows, w, values, _ = drawn(rng, name, sizes, k, 264)
    scales = dict(w.scales)
    spoilt = {"mxfp4": 0xFF, "nvfp4": 0x7F}.get(name, np.nan)
    first = next(iter(CODES[name][1]))
    scales[first] = scales[first].at[4, 0, -1, -1].set(spoilt)
    w = ScaledArray(w.codes, scales, name)
    expected = reference.grouped_matmul(values, float64(w.decode("float32")), sizes)
    assert np.isnan(expected).any()
    for out, _ in runs(rows, w, sizes):
        np.testing.assert_array_equal(np.isnan(float64(out)), np.isnan(expected))
        assert_close(np.nan_to_num(float64(out)), np.nan_to_num(expected), "bfloat16")


@every_format
@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_of_rows(rng, name, parts):
    """By a kernel for dense weights, with the decoded weight, and on the portable path."""
    sizes, k, n = GROUPS["ragged"], k_of(name, 256), 136
    rows, w, values, weights = drawn(rng, name, sizes, k, n, parts)
    dout = jnp.asarray(rng.normal(size=(NUM_ROWS, parts * n)), jnp.bfloat16)
    asked = problem("dgrad", NUM_ROWS, w.shape, "bfloat16", rhs=operand_of(w))
    assert BACKEND.supports(asked) is None

    def both(backend):
        product = functools.partial(grouped_matmul, backend=backend)
        out, pullback = jax.vjp(lambda rows: product(rows, w, jnp.asarray(sizes, jnp.int32)), rows)
        return out, *pullback(dout)

    expected = reference.grouped_matmul(float64(dout), weights.swapaxes(1, 2), sizes)
    for backend in (CutlassBackend(), XlaBackend()):
        out, drows = jax.jit(both, static_argnums=0)(backend)
        assert_close(float64(out), reference.grouped_matmul(values, weights, sizes), "bfloat16")
        assert_close(float64(drows), expected, "bfloat16")
        assert not drows[np.sum(sizes) :].any()


@pytest.mark.parametrize("activation", ["relu2", "gelu", "swiglu"])
@pytest.mark.parametrize("name", ["mxfp4", "fp8_block"])
def test_a_layer_trains_beside_frozen_codes(rng, name, activation):
    """Values and gradients of a layer, whose forward products widen codes, against the portable backend's."""
    config = dataclasses.replace(
        layer_of(activation),
        hidden_size=256,
        latent_size=128,
        expert_intermediate_size=256,
        dtype="bfloat16",
        param_dtype="bfloat16",
    )
    params = quantize(init_params(jax.random.key(0), config), config, name)
    x, dy = (jnp.asarray(rng.normal(size=(300, 256)), jnp.bfloat16) for _ in range(2))

    def run(backend):
        y, pullback = jax.vjp(lambda x: latent_moe(params, x, dataclasses.replace(config, backend=backend))[0], x)
        alone = latent_moe(params, x, dataclasses.replace(config, backend=backend))[0]
        return alone, y, *pullback(dy)

    compiled_run = jax.jit(run, static_argnums=0)
    found, portable = compiled_run(CutlassBackend(fuse="always", decode="never")), compiled_run(XlaBackend())
    for value, other, label in zip(found, portable, ("without a gradient", "with one", "gradient"), strict=True):
        assert_close(float64(value), float64(other), "bfloat16", label)


@pytest.mark.parametrize(("name", "experts"), [("int8", 520), ("mxfp4", 1040)])
def test_codes_beyond_two_to_the_31_bytes(rng, name, experts):
    """The few experts that have rows, at either end of the codes."""
    k, n, packing = 2048, 2112, FORMATS[name].packing
    assert experts * k * n // packing > 2**31
    sizes = np.zeros(experts, np.int32)
    sizes[[0, experts // 2, experts - 2, experts - 1]] = [3, 130, 200, 67]
    draw = jax.jit(jax.random.bits, static_argnums=(1, 2))
    codes = draw(jax.random.key(0), (experts, 1, n, k // packing), "uint8")
    if name == "int8":
        codes = codes.astype(jnp.int8)
        scales = {"channel": jnp.asarray(rng.uniform(0.1, 1, (experts, 1, n, 1)), jnp.float32)}
    else:
        scales = {"block": jnp.asarray(rng.integers(120, 128, (experts, 1, n, k // 32)), jnp.uint8)}
    w = ScaledArray(codes, scales, name)
    rows = jnp.asarray(rng.normal(size=(400, k)), jnp.bfloat16)
    for out, _ in runs(rows, w, sizes):
        start = 0
        for expert in np.flatnonzero(sizes):
            group = slice(start, start + sizes[expert])
            kernel = float64(w[int(expert)].decode("float32"))
            assert_close(float64(out[group]), float64(rows[group]) @ kernel, "bfloat16", f"expert {expert}")
            start += sizes[expert]
