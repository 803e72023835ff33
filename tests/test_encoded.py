"""FP8 products that encode the hidden rows, without a GPU: the decision, the calls, and experts that read the codes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import CutlassBackend, PallasBackend, Precision, UnsupportedError, expert_plan, native, presets
from jax_latent_moe.experts import routed_experts
from jax_latent_moe.formats import ScaledRows, encode, encode_rows
from jax_latent_moe.grouped_matmul import Epilogue, Operand, Operands, problem, select
from jax_latent_moe.grouped_matmul.cutlass_sm90.backend import Cutlass
from jax_latent_moe.grouped_matmul.cutlass_sm90.tiles import kernel_name
from jax_latent_moe.grouped_matmul.registry import bind
from jax_latent_moe.routing.permute import make_dispatch_plan
from jax_latent_moe.row_encoders import RowEncoder
from tests.kernels import H200, bound_activation, layer_of
from tests.oracle import formats as oracle
from tests.oracle.fused import activation_of_rows
from tests.test_precision import rounded_rows, rounded_weight
from tests.tolerances import relative_error

pytestmark = pytest.mark.usefixtures("install_library")
GATED = ("swiglu", "geglu", "geglu_tanh", "situ_glu")
ALWAYS = CutlassBackend(fuse="always")
W_SHAPE = (64, 1024, 2688)
FP8 = Operand("fp8_block")


def epilogue(name="relu2", residual: Any = None, encodes: str | None = "fp8_block") -> Epilogue:
    return Epilogue(bound_activation(name), residual, encodes=encodes)


def asked(**changes):
    plain = problem("fwd", 8192, W_SHAPE, "bfloat16", lhs=FP8, rhs=FP8, epilogue=epilogue(), device=H200)
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        (ALWAYS, {}, None),
        (ALWAYS, {"epilogue": epilogue(residual="hidden", encodes="fp8_block_pow2")}, None),
        (ALWAYS, {"epilogue": epilogue("swiglu", "pre"), "n": 2080}, None),
        (ALWAYS, {"epilogue": epilogue("swiglu", "pre"), "n": 2064}, "half of n=2064 of FP8 codes"),
        (ALWAYS, {"epilogue": epilogue("swiglu", "gate_hidden")}, "no kernel was compiled for fwd of fp8_block"),
        (ALWAYS, {"epilogue": epilogue("swiglu", "pre", None)}, "only where they encode the hidden rows"),
        (ALWAYS, {"epilogue": epilogue("gelu", "pre")}, "no kernel was compiled for fwd of fp8_block"),
        (ALWAYS, {"epilogue": epilogue(encodes="int8")}, "in fp8_block or fp8_block_pow2, not int8"),
        (ALWAYS, {"lhs": Operand("bfloat16"), "rhs": Operand("bfloat16")}, "only its FP8 kernels encode hidden rows"),
        (CutlassBackend(), {}, None),
        (
            CutlassBackend(),
            {"epilogue": epilogue("swiglu", "pre")},
            "leaves swiglu, encoded in fp8_block, of fwd",
        ),
        (CutlassBackend(fuse="never"), {}, "fuse='never' leaves"),
    ],
)
def test_what_encodes_and_what_is_refused(config, changes, reason):
    found = Cutlass(config).supports(asked(**changes))
    assert found is None if reason is None else reason in (found or "")


def test_other_backends_refuse():
    for config in (PallasBackend(fuse="always"), "xla"):
        with pytest.raises(UnsupportedError, match="epilogues"):
            select(asked(), config)


@pytest.mark.parametrize("residual", [None, "hidden"])
def test_tiles_hold_whole_blocks_of_a_row(residual):
    encoded = epilogue(residual=residual)
    same = asked(epilogue=encoded)
    names = {kernel_name(same, tile) for tile in Cutlass(ALWAYS).tiles(same)}
    assert names == {f"sm90.fwd.e4m3.relu2:hidden.{tile}.1x2" for tile in ("128x128x6", "192x128x4", "256x128x4")}
    plain = asked(epilogue=dataclasses.replace(encoded, encodes=None))
    assert len({kernel_name(plain, tile) for tile in Cutlass(ALWAYS).tiles(plain)}) == 4
    for name in GATED:
        gated = asked(epilogue=epilogue(name, residual and "pre"))
        (found,) = {kernel_name(gated, tile) for tile in Cutlass(ALWAYS).tiles(gated)}
        assert found == f"sm90.fwd.e4m3.{name}:pre.128x256x4.1x2"


def plan_of(config, inner=2688):
    columns = inner * (2 if config.gated else 1)
    return expert_plan.plan_experts(config, 4096, (512, 1024, columns), (512, inner, 1024), "bfloat16", device=H200)


def test_a_plan_says_what_encodes_the_hidden_rows():
    precision = Precision("fp8_block", "fp8_block_pow2")
    config = dataclasses.replace(presets.NEMOTRON_3_SUPER, precision=precision, backend=ALWAYS)
    plan = plan_of(config)
    assert plan.encode_hidden is None
    assert "encode_hidden" not in str(plan)
    assert "up: fwd with relu2, encoded in fp8_block keeping hidden of gathered fp8_block" in str(plan)
    assert "up_without_gradient: fwd with relu2, encoded in fp8_block keeping nothing" in str(plan)
    assert plan_of(dataclasses.replace(config, backend="auto")).encode_hidden is None
    gated = plan_of(dataclasses.replace(config, activation="swiglu"))
    assert (gated.residual, gated.encode_hidden) == ("pre", None)
    assert "up: fwd with swiglu, encoded in fp8_block keeping pre" in str(gated)
    for other in (
        dataclasses.replace(config, activation="swiglu", backend="auto"),
        dataclasses.replace(config, backend=CutlassBackend(fuse="never")),
        dataclasses.replace(config, activation="gelu"),
        dataclasses.replace(config, expert_bias=True, backend="auto"),
    ):
        assert plan_of(other).encode_hidden == RowEncoder("fp8_block", None)
        assert "encoded in" not in str(plan_of(other))
    assert plan_of(dataclasses.replace(config, precision=Precision(None, "fp8_block"))).encode_hidden is None


@pytest.mark.parametrize(
    ("name", "residual"), [("relu2", None), ("relu2", "hidden"), ("situ_glu", None), ("swiglu", "pre")]
)
def test_calls_lower_for_cuda(name, residual):
    width, parts = 144, 2 if name in GATED else 1

    def run(rows, w, sizes):
        rows, w = encode_rows(rows, "fp8_block"), encode(w, "fp8_block", parts=parts)
        same = asked(
            num_rows=16, num_experts=2, k=64, n=parts * width, epilogue=epilogue(name, residual, "fp8_block_pow2")
        )
        outputs = bind(Cutlass(ALWAYS), same)(Operands(rows, w, sizes))
        assert isinstance(outputs.out, ScaledRows)
        assert (outputs.out.format, outputs.out.dtype) == ("fp8_block_pow2", "bfloat16")
        return outputs.out.codes, outputs.out.scales["block"], outputs.residual

    given = jnp.zeros((16, 64), jnp.bfloat16), jnp.zeros((2, 64, parts * width)), jnp.asarray([9, 7])
    lowered = jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "@latent_moe_matmul_encoded(" in text
    assert f"keep_residual = {'true' if residual else 'false'}" in text
    assert "power_of_two = true" in text
    assert ("linear_beta = 2.500000e+01" in text) == (name == "situ_glu")
    shapes = [value.shape for value in jax.tree.leaves(lowered.out_info)]
    assert shapes == [(16, width), (16, 2)] + ([(16, parts * width)] if residual else [])


E4M3 = np.array([oracle.e4m3(code) for code in range(256)])


def decoded(codes, scales):
    """[..., N, K] in float64, of scales of blocks of 1 x 128, or of 128 x 128 if there are fewer rows of scales."""
    *_, rows, k = codes.shape
    wide = np.repeat(scales, 1 if scales.shape[-2] == rows else 128, axis=-2)[..., :rows, :]
    return E4M3[codes] * np.repeat(wide, 128, axis=-1)[..., :k]


def emulate(target, operands, results, **attributes):
    """The targets of FP8 products and of encoders, in NumPy float64."""
    native._check_buffers(target, "operands", operands)
    native._check_buffers(target, "results", results)
    assert attributes.keys() == native.INTERFACE[target]["attributes"].keys()

    def run(*arrays):
        arrays = [np.asarray(array) for array in arrays]
        if target == "encode_rows":
            return _encode(arrays[0], attributes["power_of_two"])
        codes, row_scales, w, w_scales, sizes = arrays
        name = attributes["kernel"].split(".")[3].split(":")[0]
        halves = 2 if name in GATED else 1
        experts, columns, k = w.shape
        w = w.reshape(experts, halves, -1, k)
        values = decoded(w, w_scales.reshape(experts, halves, -1, w_scales.shape[-1])).reshape(experts, columns, k)
        rows, pre, start = decoded(codes, row_scales.T), np.zeros((len(codes), columns)), 0
        for expert, size in enumerate(sizes):
            pre[start : start + size] = rows[start : start + size] @ values[expert].T
            start += size
        pre = pre.astype(jnp.bfloat16)
        counters = np.zeros(2, np.int32)
        if target == "matmul_codes":
            return pre, counters
        hidden = activation_of_rows(layer_of(name), np.float64(pre))[0].astype(jnp.bfloat16)
        kept = hidden if ":hidden." in attributes["kernel"] else pre
        kept = kept if attributes["keep_residual"] else kept[:0]
        return kept, *_encode(hidden, attributes["power_of_two"]), counters

    return list(jax.pure_callback(run, list(results), *operands))


def _encode(rows, power_of_two):
    codes, scales = oracle.fp8_block(np.float32(rows), power_of_two=power_of_two, n_block=1, least=1e-30)
    return codes, scales["block"].T.copy()


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("format", ["fp8_block", "fp8_block_pow2"])
@pytest.mark.parametrize("name", ["relu2", "swiglu"])
def test_experts_multiply_the_codes_of_the_first_product(rng, monkeypatch, name, format):
    """Latent 48, inner 144: blocks are partial. One expert of five has no token, and k is 3."""
    experts, latent, inner, tokens, choices = 5, 48, 144, 21, 3
    parts = 2 if name in GATED else 1
    config = dataclasses.replace(
        layer_of(name), num_experts=experts, top_k=choices, precision=Precision(format), backend=ALWAYS
    )
    x, weights = rng.normal(size=(tokens, latent)), rng.random((tokens, choices))
    w_in = rng.normal(size=(experts, latent, parts * inner)) / 7
    w_out = rng.normal(size=(experts, inner, latent)) / 12
    x, w_in, w_out = (np.asarray(array, jnp.bfloat16) for array in (x, w_in, w_out))
    ids = rng.permuted(np.tile(np.arange(experts - 1), (tokens, 1)), axis=1)[:, :choices]
    called = []

    def call(target, *args, **attributes):
        called.append(target)
        return emulate(target, *args, **attributes)

    monkeypatch.setattr(native, "call", call)
    monkeypatch.setattr(expert_plan, "current_device", lambda: H200)
    dispatch = make_dispatch_plan(jnp.asarray(ids, jnp.int32), experts)
    run = jax.jit(lambda x, weights, w_in, w_out: routed_experts(config, x, weights, w_in, w_out, dispatch))
    y = run(x, weights, w_in, w_out)
    assert called == ["encode_rows", "matmul_encoded", "matmul_codes"]

    rows = np.asarray(rounded_rows(x, format))
    up = [rounded_weight(np.float64(w), format, parts) for w in w_in]
    down = [rounded_weight(np.float64(w), format) for w in w_out]
    expected = np.zeros((tokens, latent))
    for token in range(tokens):
        for choice, expert in enumerate(ids[token]):
            pre = np.asarray(rows[token] @ up[expert], jnp.bfloat16)[None]
            hidden = np.asarray(activation_of_rows(config, np.float64(pre))[0], jnp.bfloat16)
            out = np.asarray(rounded_rows(hidden, format) @ down[expert], jnp.bfloat16)[0]
            expected[token] += weights[token, choice] * np.float64(out)
    assert relative_error(y, expected) < 4e-3, "one rounding of the result to bfloat16"
