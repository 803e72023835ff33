"""The compiled encoders of rows: what they compute, emulated on the CPU, and where they are chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import CutlassBackend, PallasBackend, Precision, expert_plan, native, presets
from jax_latent_moe.experts import routed_experts
from jax_latent_moe.native import Library
from jax_latent_moe.routing.permute import make_dispatch_plan
from jax_latent_moe.row_encoders import GradientEncoder, RowEncoder, gradient_encoder, row_encoder
from tests import emulated, emulated_rows
from tests.cases import TOY
from tests.kernels import A100, CPU, H100, H200
from tests.oracle import formats as oracle
from tests.test_precision import EXACT, EXPERTS, INNER, config_of, drawn, loop
from tests.tolerances import assert_close, relative_error

FORMATS = ("fp8_block", "fp8_block_pow2")
SUPER = dataclasses.replace(presets.NEMOTRON_3_SUPER, precision=Precision("fp8_block", "fp8_block_pow2"))
emulates = pytest.mark.skipif(emulated.missing() is not None, reason=f"{emulated.missing()}")


@pytest.fixture
def emulation(monkeypatch, install_library):
    """The encoders run on the CPU, and the plan chooses them as on a Hopper GPU. Lists the targets that were called."""
    called = []

    def call(target, *args, **attributes):
        called.append(target)
        return emulated_rows.call(target, *args, **attributes)

    monkeypatch.setattr(native, "call", call)
    for name in ("row_encoder", "gradient_encoder"):
        decide = getattr(expert_plan, name)
        monkeypatch.setattr(expert_plan, name, lambda *args, f=decide, **more: f(*args[:-1], H200, **more))
    return called


def check_codes(found, rows, format):
    """Codes and scales of every block to the bit. Blocks with NaN or infinity decode to NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        codes, scales = oracle.fp8_block(
            np.asarray(rows, np.float32), power_of_two=format == "fp8_block_pow2", n_block=1, least=1e-30
        )
    np.testing.assert_array_equal(found.scales["block"], scales["block"])
    finite = np.repeat(np.isfinite(scales["block"]), 128, axis=1)[:, : rows.shape[1]]
    np.testing.assert_array_equal(np.asarray(found.codes)[finite], codes[finite])
    assert np.isnan(np.asarray(found.decode("float32"))[~finite]).all()
    assert not finite.all()


def check_gradient(rng, shape, dtype, format):
    """As NumPy computes it in float32, to the bit. A row with NaN or infinity changes no other row."""
    kind = jnp.dtype(dtype)
    dhidden = rows_of(rng, shape, dtype)
    hidden = np.square(np.maximum(rng.normal(size=dhidden.shape), 0)).astype(kind)
    weights = rng.normal(size=shape[0]).astype(np.float32)
    weights[7:9] = 0, np.nan
    dpre, codes, sums = jax.jit(GradientEncoder(format, None))(*map(jnp.asarray, (dhidden, hidden, weights)))
    with np.errstate(invalid="ignore", over="ignore"):
        d, h = np.float32(dhidden), np.float32(hidden)
        expected = (np.float32(2) * np.sqrt(h) * (weights[:, None] * d)).astype(kind)
        expected_sums = np.sum(np.float64(d) * h, axis=1)
    assert dpre.dtype == dtype
    np.testing.assert_array_equal(np.float32(dpre), np.float32(expected))
    check_codes(codes, np.asarray(dpre), format)
    finite = np.isfinite(expected_sums)
    np.testing.assert_array_equal(np.isfinite(sums), finite)
    assert_close(np.asarray(sums)[finite], expected_sums[finite], "float32")


def rows_of(rng, shape, dtype):
    """Rows of blocks with many sizes: normal, zero, tiny, subnormal, huge, with NaN, with infinity."""
    rows = rng.normal(size=shape) * rng.uniform(0.001, 3, size=shape)
    rows[0] = 0
    rows[1] *= 1e-6
    rows[2, 128:] *= 1e-33  # below the least amax
    rows[3] *= 1e3
    rows[4] = rng.integers(1, 200, shape[1]) * 1e-45
    rows[5, 3], rows[6, 130], rows[7, -1] = np.nan, np.inf, -np.inf
    return rows.astype(jnp.dtype(dtype))


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", emulated_rows.SOURCES)
def test_codes_to_the_bit(rng, dtype, format):
    """The last tile has 3 rows, and the last block 8 columns."""
    rows = rows_of(rng, (67, 264), dtype)
    found = RowEncoder(format, None)(jnp.asarray(rows))
    assert (found.format, found.dtype, found.shape) == (format, dtype, rows.shape)
    check_codes(found, rows, format)


@emulates
@pytest.mark.usefixtures("emulation")
def test_values_halfway_between_two_codes(rng):
    """448 / amax in place of 1 / (amax / 448) would give the other neighbour."""
    amax = rng.uniform(1, 2, 20_000).astype(np.float32)
    inverse, once = np.float32(1) / (amax / np.float32(448)), np.float32(448) / amax
    value = np.float32(17) / inverse
    differ = oracle.nearest_e4m3(value * inverse) != oracle.nearest_e4m3(value * once)
    rows = np.stack([amax[differ][:16], value[differ][:16]] + [np.zeros(16, np.float32)] * 6, axis=1)
    assert rows.shape == (16, 8)
    found = RowEncoder("fp8_block", None)(jnp.asarray(rows))
    np.testing.assert_array_equal(found.codes, oracle.fp8_block(rows, n_block=1, least=1e-30)[0])


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gradient_of_relu2_and_its_codes(rng, dtype, format):
    """The last tile has 3 rows, and the last block 8 columns."""
    check_gradient(rng, (67, 264), dtype, format)


@emulates
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("activation", "dtype"), [("relu2", "float16"), ("swiglu", "float32")])
def test_values_and_gradients_of_experts(rng, emulation, activation, dtype):
    """Against one assignment at a time. XLA encodes the latents, whose width the kernel refuses."""
    config = dataclasses.replace(config_of(activation, fwd="fp8_block", dgrad="fp8_block"), dtype=dtype)
    *arrays, biases, ids, dy = drawn(rng, config)
    arrays = [array if i == 1 else array.astype(dtype) for i, array in enumerate(arrays)]
    dy = (1e7 * dy).astype(dtype)

    def run(x, weights, w_in, w_out):
        dispatch = make_dispatch_plan(jnp.asarray(ids), EXPERTS)
        experts = w_in.reshape(*w_in.shape[:2], -1, INNER) if config.gated else w_in
        return routed_experts(config, x, weights, experts, w_out, dispatch)

    y, pullback = jax.vjp(jax.jit(run), *arrays)
    rounding = np.float16 if dtype == "float16" else np.float64
    expected = loop(config, *map(np.float32, arrays), biases, ids, np.float32(dy), rounding)
    found = dict(zip(("y", "x", "weights", "w_in", "w_out"), (y, *pullback(jnp.asarray(dy))), strict=True))
    for (name, value), wanted in zip(found.items(), expected, strict=False):
        assert relative_error(value, wanted) < EXACT, name
    of_dpre = "relu2_gradient" if activation == "relu2" else "encode_rows"
    assert set(emulation) == {"encode_rows", of_dpre}, "hidden rows forward, and the pre-activation's gradient"


def plan_of(config, device=H200, dtype="bfloat16", inner=2688):
    columns = inner * (2 if config.gated else 1)
    return expert_plan.plan_experts(config, 4096, (512, 1024, columns), (512, inner, 1024), dtype, device=device)


@pytest.mark.usefixtures("install_library")
def test_a_plan_says_what_encodes_rows():
    plan = plan_of(dataclasses.replace(SUPER, backend="auto"))
    assert plan.encode_hidden is None, "the first product encodes them"
    assert str(plan).splitlines()[-4:] == [
        "encode_tokens: the compiled kernel encodes rows in fp8_block",
        "encode_dout: the compiled kernel encodes rows in fp8_block_pow2",
        "encode_dpre: the compiled kernel encodes rows in fp8_block_pow2",
        "gradient: the compiled kernel computes relu2's gradient and encodes it in fp8_block_pow2",
    ]
    apart = str(plan_of(dataclasses.replace(SUPER, backend=CutlassBackend(fuse="never"))))
    assert "encode_hidden: the compiled kernel encodes rows in fp8_block\n" in apart
    half = dataclasses.replace(SUPER, precision=Precision("fp8_block"))
    assert plan_of(half).encode_tokens == RowEncoder("fp8_block", None)
    assert plan_of(half).encode_dout is plan_of(half).encode_dpre is plan_of(half).gradient is None
    assert "encode" not in str(plan_of(dataclasses.replace(SUPER, precision=None)))
    gated = plan_of(dataclasses.replace(SUPER, activation="swiglu"))
    assert gated.encode_dpre == RowEncoder("fp8_block_pow2", None)
    assert "XLA computes the activation's gradient: the compiled kernel has the gradient of relu2" in str(gated)


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"device": H100}, None),
        ({"backend": CutlassBackend()}, None),
        ({"format": "fp8_block_pow2"}, None),
        ({"device": CPU}, "the compiled kernel is for NVIDIA Hopper GPUs"),
        ({"device": A100}, "not 'NVIDIA A100-SXM4-80GB'"),
        ({"backend": PallasBackend()}, "has no kernel that encodes rows"),
        ({"backend": "xla"}, "has no kernel that encodes rows"),
        ({"width": 2692}, "a positive multiple of 8 features, not 2692"),
        ({"width": 0}, "a positive multiple of 8 features, not 0"),
        ({"format": "fp8_of_a_user"}, "fp8_block or fp8_block_pow2, not fp8_of_a_user"),
        ({"dtype": "float64"}, "not float64"),
    ],
    ids=str,
)
def test_where_the_kernels_are_refused(change, reason):
    relu2 = {"activation": TOY.bound_activation, "residual": "hidden"}
    asked = {"format": "fp8_block", "backend": "auto", "width": 2688, "dtype": "bfloat16", "device": H200} | change
    for found in (row_encoder(**asked), gradient_encoder(**asked, **relu2)):
        assert found is not None
        assert found.refusal is None if reason is None else reason in str(found)


def test_what_the_gradients_kernel_alone_refuses(install_library):
    relu2 = TOY.bound_activation

    def refusal(backend="auto", dtype="bfloat16", residual="hidden", activation=relu2):
        given = {"activation": activation, "residual": residual}
        found = gradient_encoder("fp8_block", backend, 256, dtype, H200, **given)
        assert found is not None
        return found.refusal or ""

    assert "not float32" in refusal(dtype="float32")
    assert "fuse='never'" in refusal(backend=CutlassBackend(fuse="never"))
    assert "of relu2" in refusal(residual="pre")
    assert "not of gelu" in refusal(activation=dataclasses.replace(TOY, activation="gelu").bound_activation)
    install_library(Library({}, "no library."))
    assert refusal() == "no library."
    assert row_encoder("fp8_block", "auto", 256, "float32", H200) == RowEncoder("fp8_block", "no library.")
