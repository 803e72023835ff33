"""The FP8 kernel without a GPU: interpreted against float64 with race detection, and lowered for CUDA."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_latent_moe.config import PallasBackend
from jax_latent_moe.errors import ConfigError
from jax_latent_moe.formats import ScaledArray, ScaledRows, encode, encode_rows
from jax_latent_moe.grouped_matmul import Epilogue, Operands, operand_of, problem, reference
from jax_latent_moe.grouped_matmul.pallas_sm90.backend import Pallas
from jax_latent_moe.grouped_matmul.pallas_sm90.config import PallasFp8Tile
from jax_latent_moe.grouped_matmul.pallas_sm90.fp8 import matmul_fp8
from jax_latent_moe.grouped_matmul.registry import bind
from jax_latent_moe.grouped_matmul.sm90 import KERNEL_ACTIVATIONS, kernel_activation
from tests.drawn import drawn
from tests.kernels import H200, bound_activation, layer_of
from tests.oracle.fused import activation_of_rows
from tests.tolerances import assert_close

EXPERTS, ROWS, IN, HIDDEN = 4, 100, 192, 192
UNEVEN = [0, 75, 1, 17]
PLAIN = PallasFp8Tile(rows=128, columns=128, stages=2, store_buffers=2)
GATED = PallasFp8Tile(rows=128, columns=128, stages=2, store_buffers=3, cluster=2)
SMALL = PallasFp8Tile(rows=64, columns=256, stages=2, store_buffers=3, band=2)


@pytest.fixture
def interpreter():
    """Parameters of the interpreter; no race may have been found when the test ends."""
    yield plgpu.InterpretGPUParams(detect_races=True)
    assert not gpu_callbacks.get_races().races_found


def operands(rng, dtype, parts):
    """Rows and weights in block FP8, and their values; NaN in padding rows."""
    rows = rng.normal(size=(ROWS, IN)) * 10.0 ** rng.uniform(-3, 0, (ROWS, 1))
    rows[sum(UNEVEN) :] = np.nan
    w = rng.normal(size=(EXPERTS, IN, parts * HIDDEN)) * 10.0 ** rng.uniform(-3, 0, (EXPERTS, 1, 1))
    rows = encode_rows(jnp.asarray(rows, dtype), "fp8_block")
    w = encode(jnp.asarray(w, jnp.float32), "fp8_block", parts=parts)
    return rows, w, *(np.float64(np.asarray(codes.decode("float32"))) for codes in (rows, w))


@pytest.mark.parametrize(
    ("name", "tile", "dtype"),
    [
        ("relu2", PLAIN, "float16"),
        ("relu2", SMALL, "bfloat16"),
        ("swiglu", GATED, "bfloat16"),
        ("swiglu", SMALL, "bfloat16"),
    ],
    ids=["plain", "plain-small", "gated-cluster", "gated-small"],
)
def test_product_and_activation(rng, name, tile, dtype, interpreter):
    """Blocks of K and of columns that are partial, several tiles of each SM, rows that no tile divides."""
    activation = kernel_activation(bound_activation(name))
    rows, w, values, weights = operands(rng, dtype, 2 if activation.gated else 1)
    settings = dict(tile=tile, num_sms=tile.cluster, interpret=interpreter)
    pre, hidden = matmul_fp8(rows, w, jnp.asarray(UNEVEN), activation=activation, residual="pre", **settings)
    assert_close(pre, reference.grouped_matmul(values, weights, UNEVEN), dtype, "pre")
    assert_close(hidden, activation_of_rows(layer_of(name), np.float64(pre))[0], dtype, "hidden")
    assert pre.dtype == hidden.dtype == dtype
    for value in (pre, hidden):
        assert not np.asarray(value)[sum(UNEVEN) :].any()


def test_gate_and_up_columns_side_by_side_and_scales_in_bytes(rng, interpreter):
    """Without an activation, a tile holds columns of both matrices, each with partial blocks; E8M0 scales are bytes."""
    rows, w, values, _ = operands(rng, "bfloat16", parts=2)
    exponents = rng.integers(120, 130, w.scales["block"].shape).astype(np.uint8)
    w = ScaledArray(w.codes, {"block": jnp.asarray(exponents)}, "fp8_block")
    weights = np.float64(np.asarray(w.decode("float32")))
    tile = dataclasses.replace(PLAIN, columns=192, cluster=2)
    (out,) = matmul_fp8(rows, w, jnp.asarray(UNEVEN), tile=tile, num_sms=2, interpret=interpreter)
    assert_close(out, reference.grouped_matmul(values, weights, UNEVEN), "bfloat16")
    assert not np.asarray(out)[sum(UNEVEN) :].any()


LOWERED = itertools.product([None, *KERNEL_ACTIVATIONS], ["large", "decode"])


@pytest.mark.parametrize(("name", "size"), drawn(LOWERED, 1 + len(KERNEL_ACTIVATIONS)), ids=str)
def test_lowers_for_cuda(name, size):
    """Layouts and shared memory at the sizes of Nemotron-3 Super, gated of Qwen3-30B-A3B; the lowering needs no GPU."""
    activation = None if name is None else bound_activation(name)
    gated = activation is not None and activation.gated
    num_rows, experts, k, n = (131072, 128, 2048, 768) if gated else (180224, 512, 1024, 2688)
    num_rows, parts = num_rows if size == "large" else 23, 2 if gated else 1
    epilogue = None if activation is None else Epilogue(activation, "pre")
    backend = Pallas(PallasBackend(fuse="always"))

    def run(codes, row_scales, w_codes, w_scales, sizes):
        rows = ScaledRows(codes, {"block": row_scales}, "fp8_block", jnp.dtype("bfloat16"))
        w = ScaledArray(w_codes, {"block": w_scales}, "fp8_block")
        operand = operand_of(rows)
        asked = problem("fwd", num_rows, w.shape, "bfloat16", lhs=operand, rhs=operand, epilogue=epilogue, device=H200)
        assert backend.supports(asked) is None
        outputs = bind(backend, asked)(Operands(rows, w, sizes))
        return outputs.out, outputs.residual

    arrays = (
        jax.ShapeDtypeStruct((num_rows, k), "uint8"),
        jax.ShapeDtypeStruct((num_rows, k // 128), "float32"),
        jax.ShapeDtypeStruct((experts, parts, n, k), "uint8"),
        jax.ShapeDtypeStruct((experts, parts, n // 128, k // 128), "float32"),
        jax.ShapeDtypeStruct((experts,), "int32"),
    )
    lowered = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") == 1
    out, residual = lowered.out_info
    assert out.shape == (num_rows, n)
    assert (residual is None) == (activation is None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 192}, "rows=192 must be 64 or 128"),
        ({"columns": 96}, "columns=96 must be a multiple of 64, at most 192, for rows=128"),
        ({"rows": 64, "columns": 192}, "columns=192 must be a multiple of 128, at most 384, for rows=64"),
        ({"columns": 256}, "columns=256 must be"),
        ({"cluster": 4}, "cluster=4 must be 1 or 2"),
        ({"stages": 6}, "lower stages=6"),
        ({"stages": 0}, "stages=0 must be"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PallasFp8Tile(**settings)
