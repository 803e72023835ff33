"""FP8 products with relu2's gradient, without a GPU: the epilogue, the decision, the call, and experts that use it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import CutlassBackend, PallasBackend, Precision, UnsupportedError, expert_plan, native, presets
from jax_latent_moe.experts import routed_experts
from jax_latent_moe.formats import ScaledRows, encode, encode_rows
from jax_latent_moe.grouped_matmul import Epilogue, Operand, Operands, problem, select
from jax_latent_moe.grouped_matmul.cutlass_sm90 import backend as cutlass_backend
from jax_latent_moe.grouped_matmul.cutlass_sm90.backend import Cutlass
from jax_latent_moe.grouped_matmul.cutlass_sm90.tiles import kernel_name
from jax_latent_moe.grouped_matmul.registry import bind
from jax_latent_moe.routing.permute import make_dispatch_plan
from jax_latent_moe.row_encoders import GradientEncoder, RowEncoder
from tests import emulated, emulated_gradient, emulated_rows
from tests.kernels import H200, bound_activation, layer_of
from tests.test_encoded import decoded, emulate
from tests.tolerances import assert_close

ALWAYS = CutlassBackend(fuse="always")
FP8 = Operand("fp8_block")
FORMATS = ("fp8_block", "fp8_block_pow2")
NUM_ROWS = 421
GROUPS = {
    "ragged": np.array([0, 1, 130, 0, 65, 193, 0, 16]),
    "one expert": np.array([0, 0, NUM_ROWS, 0]),
    "one row": np.array([0, 0, 0, 1]),
    "none": np.zeros(3, int),
}
emulates = pytest.mark.skipif(emulated.missing() is not None, reason=f"{emulated.missing()}")


def drawn(rng, rows, width):
    """Accumulators, hidden rows and weights of many sizes, some of them NaN or infinite."""
    product = rng.normal(size=(rows, width)) * rng.uniform(1e-3, 3, size=(rows, 1))
    hidden = np.square(np.maximum(rng.normal(size=(rows, width)), 0))
    hidden[5] *= 1e30  # above 2^63
    hidden[6] *= 1e-30  # below 2^-80
    hidden[7] = rng.integers(0, 100, width) * 1e-40  # subnormal
    hidden[8, ::3], hidden[9, 5], hidden[10, 7] = 3e38, np.inf, np.nan
    product[11] *= 1e-35
    product[12, 3], product[13, -1], product[14] = np.nan, np.inf, 0
    weights = rng.normal(size=rows)
    weights[15:17] = 0, np.nan
    return product.astype(np.float32), hidden.astype(jnp.bfloat16), weights.astype(np.float32)


@emulates
@pytest.mark.parametrize("tile_rows", emulated_gradient.TILE_ROWS)
@pytest.mark.parametrize("width", [272, 128, 16], ids=str)
def test_the_epilogue_gives_the_bits_of_the_kernel_behind_a_product(rng, monkeypatch, tile_rows, width):
    """Also of the sums for the weights. Padding rows get zeros, whatever they held."""
    monkeypatch.setattr(native, "call", emulated_rows.call)
    product, hidden, weights = drawn(rng, NUM_ROWS, width)
    for format in FORMATS:
        for groups, sizes in GROUPS.items():
            count = sizes.sum()
            inside = np.arange(NUM_ROWS) < count
            dhidden, kept = (np.where(inside[:, None], array, 0).astype(jnp.bfloat16) for array in (product, hidden))
            dirty = [np.where(inside.reshape(-1, *[1] * (a.ndim - 1)), a, np.nan) for a in (product, hidden, weights)]
            given = [array.astype(like.dtype) for array, like in zip(dirty, (product, hidden, weights), strict=True)]
            for rows_first in (False, True):
                found = emulated_gradient.gradient(
                    *given,
                    sizes.astype(np.int32),
                    tile_rows=tile_rows,
                    power_of_two=format == "fp8_block_pow2",
                    rows_first=rows_first,
                )
                expected = native.call(
                    "relu2_gradient",
                    [jnp.asarray(dhidden), jnp.asarray(kept), jnp.asarray(np.where(inside, weights, 0))],
                    [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in found],
                    power_of_two=format == "fp8_block_pow2",
                )
                for name, one, other in zip(("dpre", "codes", "scales", "sums"), found, expected, strict=True):
                    np.testing.assert_array_equal(np.float32(one), np.float32(other), err_msg=f"{name} {groups}")
                dpre, codes, _, sums = found
                assert not np.float32(dpre[count:]).any()
                assert not codes[count:].any()
                assert not sums[:, count:].any()


@emulates
@pytest.mark.parametrize("tile_rows", emulated_gradient.TILE_ROWS)
def test_the_epilogue_against_float64(rng, tile_rows):
    sizes, width = GROUPS["ragged"].astype(np.int32), 272
    product = rng.normal(size=(NUM_ROWS, width)).astype(np.float32)
    hidden = np.square(np.maximum(rng.normal(size=product.shape), 0)).astype(jnp.bfloat16)
    weights = rng.normal(size=NUM_ROWS).astype(np.float32)
    dpre, codes, scales, sums = emulated_gradient.gradient(
        product, hidden, weights, sizes, tile_rows=tile_rows, power_of_two=False
    )
    inside = np.arange(NUM_ROWS) < sizes.sum()
    dhidden, h = (np.float64(array) * inside[:, None] for array in (product.astype(jnp.bfloat16), hidden))
    exact = 2 * np.sqrt(h) * weights[:, None] * dhidden
    assert_close(np.float64(dpre), exact, "bfloat16")
    assert_close(sums.sum(axis=0), np.sum(dhidden * h, axis=1), "float32")
    values = decoded(codes, scales.T)
    steps = np.abs(exact) * 2.0**-4 + np.repeat(scales.T, 128, axis=1)[:, :width] * 2.0**-10
    assert (np.abs(values - np.float64(dpre)) <= steps).all()


def asked(**changes):
    epilogue = Epilogue(bound_activation("relu2"), "hidden", encodes="fp8_block")
    shape = 64, 2688, 1024
    plain = problem("dgrad", 8192, shape, "bfloat16", lhs=FP8, rhs=FP8, epilogue=epilogue, device=H200)
    return dataclasses.replace(plain, **changes)


@pytest.mark.usefixtures("install_library")
def test_what_has_the_gradient_and_what_is_refused():
    def refusal(config=ALWAYS, **changes):
        return Cutlass(config).supports(asked(**changes))

    epilogue = asked().epilogue
    assert epilogue is not None
    assert refusal() is None
    assert refusal(epilogue=dataclasses.replace(epilogue, encodes="fp8_block_pow2")) is None
    assert "fuse='never' leaves" in refusal(CutlassBackend(fuse="never"))
    assert "computes only fwd" in refusal(epilogue=None)
    assert "computes only fwd" in refusal(epilogue=dataclasses.replace(epilogue, encodes=None))
    assert "not int8" in refusal(epilogue=dataclasses.replace(epilogue, encodes="int8"))
    assert "k=2696 of FP8 codes is not a positive multiple of 16" in refusal(k=2696)
    for name, residual in (("swiglu", "pre"), ("gelu", "pre"), ("relu2", "pre")):
        other = Epilogue(bound_activation(name), residual, encodes="fp8_block")
        assert "no kernel was compiled for dgrad of fp8_block" in refusal(epilogue=other)
    for backend in (PallasBackend(fuse="always"), "xla"):
        with pytest.raises(UnsupportedError, match=r"computes only fwd|epilogues"):
            select(asked(), backend)
    names = {kernel_name(asked(), tile) for tile in Cutlass(ALWAYS).tiles(asked())}
    assert names == {f"sm90.dgrad.e4m3.relu2:hidden.{tile}.1x2" for tile in ("128x128x5", "192x128x4")}


def plan_of(config):
    inner = 2688
    columns = inner * (2 if config.gated else 1)
    return expert_plan.plan_experts(config, 4096, (512, 1024, columns), (512, inner, 1024), "bfloat16", device=H200)


@pytest.mark.usefixtures("install_library")
def test_a_plan_says_what_computes_the_gradient(monkeypatch):
    precision = Precision("fp8_block", "fp8_block_pow2")
    config = dataclasses.replace(presets.NEMOTRON_3_SUPER, precision=precision, backend=ALWAYS)
    plan = plan_of(config)
    assert plan.encode_dpre is plan.gradient is None
    assert "down_dgrad: dgrad with relu2, encoded in fp8_block_pow2 keeping hidden of gathered fp8_block_pow2" in str(
        plan
    )
    assert plan_of(dataclasses.replace(config, precision=Precision(None, "fp8_block"))).gradient is None
    apart = [
        dataclasses.replace(config, backend=CutlassBackend(fuse="never")),
        dataclasses.replace(config, activation="swiglu"),
        dataclasses.replace(config, expert_bias=True, backend="auto"),
    ]
    for other in apart:
        found = plan_of(other)
        assert found.down_dgrad.problem.contraction == "fwd"
        assert found.encode_dpre == RowEncoder("fp8_block_pow2", None)
    # One constant decides what "measured" and "auto" do.
    for faster in ((), ("relu2",)):
        monkeypatch.setitem(cutlass_backend.FASTER_ENCODED, "dgrad", faster)
        measured = plan_of(dataclasses.replace(config, backend="auto"))
        assert measured.gradient == (None if faster else GradientEncoder("fp8_block_pow2", None))


@pytest.mark.usefixtures("install_library")
def test_the_call_lowers_for_cuda():
    k, n = 144, 64

    def run(dout, w, sizes, hidden, weights):
        dout, w = encode_rows(dout, "fp8_block"), encode(jnp.swapaxes(w, 1, 2), "fp8_block")
        epilogue = Epilogue(bound_activation("relu2"), "hidden", encodes="fp8_block_pow2")
        same = asked(num_rows=16, num_experts=2, k=k, n=n, epilogue=epilogue)
        outputs = bind(Cutlass(ALWAYS), same)(Operands(dout, w, sizes, hidden, weights))
        assert isinstance(outputs.codes, ScaledRows)
        assert (outputs.codes.format, outputs.codes.dtype) == ("fp8_block_pow2", "bfloat16")
        return outputs.out, outputs.codes.codes, outputs.codes.scales["block"], outputs.row_weight_gradients

    given = jnp.zeros((16, n), jnp.bfloat16), jnp.zeros((2, k, n)), jnp.asarray([9, 7])
    more = jnp.zeros((16, k), jnp.bfloat16), jnp.ones(16)
    lowered = jax.jit(run).trace(*given, *more).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "@latent_moe_matmul_encoded_grad(" in text
    assert "power_of_two = true" in text
    assert "operand_index = 5" in text, "the gradient overwrites the hidden rows"
    assert [value.shape for value in jax.tree.leaves(lowered.out_info)] == [(16, k), (16, k), (16, 2), (16,)]


def emulated_call(target, operands, results, *, input_output_aliases=None, **attributes):
    """Products in NumPy float64. Encoders and the epilogue are the compiled sources."""
    del input_output_aliases
    if target in ("encode_rows", "relu2_gradient"):
        return emulated_rows.call(target, operands, results, **attributes)
    if target in ("matmul_codes", "matmul_encoded"):
        return emulate(target, operands, results, **attributes)
    run = {"wgrad": _wgrad, "matmul_encoded_grad": _gradient}[target]
    native._check_buffers(target, "operands", operands)
    native._check_buffers(target, "results", results)
    assert attributes.keys() == native.INTERFACE[target]["attributes"].keys()

    def program(*arrays):
        return emulated.in_turn(run, results, attributes, *arrays)

    return list(jax.pure_callback(program, list(results), *operands))


def _gradient(results, attributes, codes, row_scales, w, w_scales, sizes, hidden, row_weights):
    del results
    values, rows, start = decoded(w, w_scales), decoded(codes, row_scales.T), 0
    product = np.full((len(codes), w.shape[1]), np.nan)
    for expert, size in enumerate(sizes):
        product[start : start + size] = rows[start : start + size] @ values[expert].T
        start += size
    product = product.astype(jnp.bfloat16).astype(np.float32)  # rounded once, as that of the plain product
    tile_rows = int(attributes["kernel"].split(".")[-2].split("x")[0])
    options = {name: attributes[name] for name in ("power_of_two", "rows_first")}
    found = emulated_gradient.gradient(product, hidden, row_weights, sizes, tile_rows=tile_rows, **options)
    return *found, np.zeros(2, np.int32)


def _wgrad(results, attributes, lhs, rhs, sizes, row_ids, gather_weights):
    def taken(table):
        rows = np.float32(table)[row_ids]
        rows = rows * gather_weights[:, None] if gather_weights.size else rows
        return rows.astype(jnp.bfloat16)

    gathers = attributes["gathered_lhs"] or attributes["gathered_rhs"]
    gathered = taken(lhs if attributes["gathered_lhs"] else rhs) if gathers else np.zeros((0, 0), jnp.bfloat16)
    lhs = np.float64(gathered if attributes["gathered_lhs"] else lhs)
    rhs = np.float64(gathered if attributes["gathered_rhs"] else rhs)
    out, start = np.zeros(results[0].shape), 0
    for expert, size in enumerate(sizes):
        out[expert] = lhs[start : start + size].T @ rhs[start : start + size]
        start += size
    return out.astype(jnp.bfloat16), gathered.reshape(results[1].shape), np.zeros(results[2].shape, np.int32)


@emulates
@pytest.mark.usefixtures("quick_compilation", "install_library")
@pytest.mark.parametrize("format", FORMATS)
def test_experts_have_the_gradients_of_separate_kernels(rng, monkeypatch, format):
    """To the bit. Latent 48, inner 144: blocks are partial. One expert of five has no token, and k is 3."""
    experts, latent, inner, tokens, choices = 5, 48, 144, 21, 3
    x, weights = rng.normal(size=(tokens, latent)), rng.random((tokens, choices))
    w_in, w_out = rng.normal(size=(experts, latent, inner)) / 7, rng.normal(size=(experts, inner, latent)) / 12
    x, w_in, w_out, dy = (np.asarray(array, jnp.bfloat16) for array in (x, w_in, w_out, rng.normal(size=x.shape)))
    ids = rng.permuted(np.tile(np.arange(experts - 1), (tokens, 1)), axis=1)[:, :choices]
    dispatch = make_dispatch_plan(jnp.asarray(ids, jnp.int32), experts)
    called = []

    def call(target, *args, **attributes):
        called.append(target)
        return emulated_call(target, *args, **attributes)

    monkeypatch.setattr(native, "call", call)
    monkeypatch.setattr(expert_plan, "current_device", lambda: H200)
    found = []
    for fuse in ("always", "measured"):
        config = dataclasses.replace(
            layer_of("relu2"),
            num_experts=experts,
            top_k=choices,
            precision=Precision(format, format),
            backend=CutlassBackend(fuse=fuse),
        )
        called.clear()

        def both(x, weights, w_in, w_out, dy, config=config):
            y, pullback = jax.vjp(lambda *given: routed_experts(config, *given, dispatch), x, weights, w_in, w_out)
            return y, *pullback(dy)

        found.append(jax.jit(both)(x, weights, w_in, w_out, dy))
        assert ("matmul_encoded_grad" in called) == (fuse == "always")
        assert ("relu2_gradient" in called) == (fuse == "measured")
    for name, one, other in zip(("y", "x", "weights", "w_in", "w_out"), *found, strict=True):
        assert np.isfinite(np.float32(one)).all(), name
        np.testing.assert_array_equal(np.float32(one), np.float32(other), err_msg=name)
