"""The kernel that widens codes, without a GPU: interpreted with race detection, its arithmetic in NumPy, and lowered.

The interpreter cannot run inlined code, so it decodes as the portable path does. What the GPU runs instead is the
arithmetic of `words`, which a warpgroup of 128 threads in NumPy runs here, instruction by instruction.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_latent_moe.config import PallasBackend
from jax_latent_moe.errors import ConfigError, InputError, UnsupportedError
from jax_latent_moe.formats import ScaledArray, encode
from jax_latent_moe.grouped_matmul import Operand, Operands, explain, problem, reference, select
from jax_latent_moe.grouped_matmul.pallas_sm90 import widen
from jax_latent_moe.grouped_matmul.pallas_sm90.backend import Pallas
from jax_latent_moe.grouped_matmul.pallas_sm90.config import PallasWidenTile
from jax_latent_moe.grouped_matmul.pallas_sm90.tiles import widen_tile_fits, widen_tiles
from jax_latent_moe.grouped_matmul.pallas_sm90.widen import matmul_widened
from jax_latent_moe.grouped_matmul.pallas_sm90.widening import WIDENINGS, widened
from jax_latent_moe.grouped_matmul.pallas_sm90.words import STEP
from jax_latent_moe.grouped_matmul.registry import bind
from tests.drawn import drawn
from tests.kernels import CPU, H200, PLAIN, library
from tests.oracle.formats import unpacked
from tests.tolerances import assert_close

EXPERTS, ROWS, UNEVEN = 4, 45, [0, 27, 1, 9]
every_format = pytest.mark.parametrize("name", WIDENINGS)


class Warpgroup:
    """The machine of `words`: a word is an array of 128 numbers, one for each thread."""

    lanes = np.arange(128, dtype=np.uint32)

    def of_lane_bit(self, bit, if_zero, if_one):
        return np.where(self.lanes >> bit & 1, np.uint32(if_one), np.uint32(if_zero))

    def row(self, half):
        return self.lanes // 32 * 16 + self.lanes % 32 // 4 + 8 * half

    def from_lane(self, word, distance):
        return word[self.lanes ^ distance]

    def prmt(self, a, b, select):
        a, b, select = (np.broadcast_to(np.uint32(x), 128) for x in (a, b, select))
        choices = np.stack([part >> 8 * byte & 255 for part in (a, b) for byte in range(4)])
        selected = [select >> 4 * byte & 15 for byte in range(4)]
        assert all((index < 8).all() for index in selected)
        return sum((choices[index, self.lanes] << 8 * byte for byte, index in enumerate(selected)), np.uint32(0))

    def rotated_right(self, word, count):
        return word >> count | word << 32 - count

    def if_nonzero(self, word, value):
        return np.where(word != 0, np.uint32(value), np.uint32(0))

    def least(self, word, bound):
        return np.minimum(word, np.uint32(bound))

    def _bf16(self, operation, a, b):
        a, b = (np.broadcast_to(np.uint32(x), 128) for x in (a, b))
        halves = []
        for shift in (0, 16):
            values = ((x >> shift & 0xFFFF).astype(np.uint16).view(ml_dtypes.bfloat16) for x in (a, b))
            with np.errstate(over="ignore"):
                halves.append(operation(*values).view(np.uint16).astype(np.uint32))
        return halves[0] | halves[1] << 16

    def sub_bf16(self, a, b):
        return self._bf16(np.subtract, a, b)

    def mul_bf16(self, a, b):
        return self._bf16(np.multiply, a, b)

    def e4m3_to_float32(self, word):
        bytes_ = ((word >> shift & 255).astype(np.uint8) for shift in (0, 8))
        return [byte.view(ml_dtypes.float8_e4m3fn).astype(np.float32).view(np.uint32) for byte in bytes_]

    def mul_float32(self, a, b):
        return (a.view(np.float32) * np.uint32(b).view(np.float32)).view(np.uint32)

    def to_bf16_pair(self, low, high):
        halves = [x.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32) for x in (low, high)]
        return halves[0] | halves[1] << 16

    def load(self, memory, offset, count):
        assert (offset % count == 0).all(), "a load must be aligned"
        return sum((memory[offset + byte].astype(np.uint32) << 8 * byte for byte in range(count)), np.uint32(0))


def fragments(codes, packing):
    """The words that each thread loads of [64, bytes]: four neighbouring bytes of 16, as Mosaic's layouts say."""
    lanes = Warpgroup.lanes
    quarter = lanes % 4 if packing == 2 else lanes % 2 * 2 + lanes % 4 // 2
    found = []
    for block in range(codes.shape[1] // 16):
        for half in range(2):
            row = Warpgroup().row(half)
            columns = block * 16 + quarter * 4
            found.append(sum(codes[row, columns + i].astype(np.uint32) << 8 * i for i in range(4)))
    return found


def matrix(words):
    """[64, 128] in bfloat16, from the A fragments of wgmma (PTX ISA, register fragments of m64nNk16)."""
    out = np.zeros((64, STEP), ml_dtypes.bfloat16)
    for index, word in enumerate(words):
        row, column = Warpgroup().row(index % 2), index // 2 * 8 + Warpgroup.lanes % 4 * 2
        for side in range(2):
            out[row, column + side] = (word >> 16 * side & 0xFFFF).astype(np.uint16).view(ml_dtypes.bfloat16)
    return out


def with_every_scale(rng, w, name):
    """Scales of every size, down to subnormal ones; one block has a NaN scale where the format has a byte for it."""
    scales = dict(w.scales)
    if name in ("mxfp4", "nvfp4"):
        # Larger ones than 2^124 overflow, which NumPy rounds as the GPU does.
        made = rng.integers(0, 0x7F if name == "nvfp4" else 250, scales["block"].shape).astype(np.uint8)
        made[0, 0, 3, -1], made[0, 0, 5, 0] = (0x7F, 0x7F) if name == "nvfp4" else (0xFF, 0xFF)
        scales["block"] = jnp.asarray(made)
    return ScaledArray(w.codes, scales, name)


def decoded(name, codes, scales):
    """The published definitions of the formats, in float64, rounded to float32 and bfloat16. Subnormals stay."""
    codes = unpacked(name, codes) if WIDENINGS[name].packing == 2 else codes
    scales = {key: np.repeat(array, codes.shape[1] // array.shape[1], axis=1) for key, array in scales.items()}
    if name in ("mxfp4", "nvfp4"):
        sizes = np.float64([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] * np.where(codes & 8, -1, 1)
        if name == "nvfp4":
            return sizes * np.float64(scales["block"].view(ml_dtypes.float8_e4m3fn))
        return sizes * np.where(scales["block"] == 255, np.nan, 2.0 ** (np.float64(scales["block"]) - 127))
    if name.startswith("int4"):
        return (np.float64(codes) - scales.get("zero", 8)) * np.float64(scales["block"])
    if name == "int8":
        return np.float64(codes.view(np.int8))
    return np.float64(codes.view(ml_dtypes.float8_e4m3fn))


@pytest.mark.parametrize("k", [256, 320], ids=["whole", "half-step"])
@every_format
def test_arithmetic(rng, name, k):
    """Every code, scales of every size and NaN, a last step that is half beyond K: right to the bit."""
    how, block = WIDENINGS[name], np.float32(rng.uniform(0.1, 1))
    if name.startswith("int4_128") and k % 128:
        pytest.skip("its groups do not divide K")
    codes, scales = rng.integers(256, size=(64, k // how.packing)).astype(np.uint8), {}
    for key, _ in how.item_bytes:
        shape = 64, k // how.group
        if name.startswith("int4") and key == "block":
            scales[key] = (rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 3, shape)).astype(ml_dtypes.bfloat16)
            scales[key][3, 0] = np.nan
        else:
            most, nan = {"mxfp4": (255, 255), "nvfp4": (127, 127)}.get(name, (16, 1))
            scales[key] = rng.integers(most, size=shape).astype(np.uint8)
            scales[key][3, 0], scales[key][5, -1] = nan, nan
        if name == "nvfp4":
            scales[key] |= rng.choice([0, 0x80], shape).astype(np.uint8)  # of either sign
    with np.errstate(over="ignore"):
        expected = decoded(name, codes, scales).astype(np.float32) * (block if how.block else np.float32(1))
        expected = np.float32(expected.astype(ml_dtypes.bfloat16))
    memories = {key: array.view(np.uint8).reshape(-1) for key, array in scales.items()}
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % how.step_bytes())))
    made = []
    for step in range(-(-k // STEP)):
        own = padded[:, step * how.step_bytes() : (step + 1) * how.step_bytes()]
        loaded, scale = fragments(own, how.packing), block.view(np.uint32)
        words = widened(Warpgroup(), how, loaded, memories, k, np.uint32(step), scale)
        made.append(np.float32(matrix(words)))
    made = np.concatenate(made, axis=1)[:, :k]
    if name == "nvfp4":
        # Any NaN spoils an output, so it does not matter which of its values are NaN.
        spoilt = np.isnan(expected).any(1)
        np.testing.assert_array_equal(np.isnan(made).any(1), spoilt)
        made, expected = made[~spoilt], expected[~spoilt]
    np.testing.assert_array_equal(made, expected)


@pytest.fixture
def interpreter():
    """Parameters of the interpreter; no race may have been found when the test ends."""
    yield plgpu.InterpretGPUParams(detect_races=True)
    assert not gpu_callbacks.get_races().races_found


def operands(rng, name, k, n, parts=1):
    """Rows with NaN in padding rows, weights in codes, and the values of both in float64."""
    rows = jnp.asarray(rng.normal(size=(ROWS, k)), jnp.bfloat16).at[sum(UNEVEN) :].set(jnp.nan)
    w = jnp.asarray(rng.normal(size=(EXPERTS, k, parts * n)) * 10.0 ** rng.uniform(-3, 0, (EXPERTS, 1, parts * n)))
    w = jax.jit(encode, static_argnames=("name", "parts"))(w.astype(jnp.float32), name=name, parts=parts)
    values = jax.jit(lambda w: w.decode("float32"))(w)
    return rows, w, np.float64(np.asarray(rows)), np.float64(np.asarray(values))


CASES = {
    "one ring": ("mxfp4", 192, PallasWidenTile(rows=16, stages=2, band=2)),
    "two rings": ("int4_128_zero", 128, PallasWidenTile(rows=40, stages=3, scale_buffers=1)),
    "a scale of each matrix": ("nvfp4", 192, PallasWidenTile(features=256, rows=8, stages=2, store_buffers=2)),
    "a scale of each output": ("int8", 192, PallasWidenTile(features=256, rows=24, stages=2)),
    "a scale of each block": ("fp8_block", 320, PallasWidenTile(rows=64, stages=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_product(rng, case, interpreter):
    """Partial steps and tiles, several tiles of each SM and of an expert, outputs of gate and up side by side."""
    name, k, tile = CASES[case]
    rows, w, values, weights = operands(rng, name, k, 64, parts=3)
    out = matmul_widened(rows, w, jnp.asarray(UNEVEN), tile=tile, num_sms=2, interpret=interpreter)
    assert out.dtype == jnp.bfloat16
    assert_close(out, reference.grouped_matmul(values, weights, UNEVEN), "bfloat16")
    assert not np.asarray(out)[sum(UNEVEN) :].any()


def test_scales_of_many_lines(rng, interpreter, monkeypatch):
    """The scales of 64 outputs are more lines than one load takes; there is one token."""
    monkeypatch.setattr(widen, "MAX_BOX", 12)
    rows, w, values, weights = operands(rng, "nvfp4", 256, 64)
    tile, sizes = PallasWidenTile(rows=8, stages=4), np.asarray([0, 1, 0, 0])
    out = matmul_widened(rows[:1], w, jnp.asarray(sizes), tile=tile, num_sms=1, interpret=interpreter)
    assert_close(out, reference.grouped_matmul(values[:1], weights, sizes), "bfloat16")


LOWERED = [("mxfp4", tokens) for tokens in (1, 8, 64, 4096)] + [
    (name, tokens) for name in ("nvfp4", "int4_32_zero", "int4_128", "int8", "fp8_block") for tokens in (1, 4096)
]


@pytest.mark.parametrize(("name", "tokens"), drawn(LOWERED, 7))
def test_lowers_for_cuda(name, tokens):
    """Layouts and shared memory at the sizes of Nemotron-3 Super, whose down-product has the larger K."""
    k, n = (2688, 1024) if tokens in (1, 64) else (1024, 2688)
    backend, num_rows = Pallas(PallasBackend()), 22 * tokens
    asked = problem("fwd", num_rows, (512, k, n), "bfloat16", rhs=Operand(name), device=H200)
    assert backend.supports(asked) is None
    rows = jax.ShapeDtypeStruct((num_rows, k), "bfloat16")
    w = jax.eval_shape(functools.partial(encode, name=name), jax.ShapeDtypeStruct((512, k, n), "float32"))
    run = jax.jit(lambda *arrays: bind(backend, asked)(Operands(*arrays)).out)
    lowered = run.trace(rows, w, jax.ShapeDtypeStruct((512,), "int32")).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") == 1
    assert lowered.out_info.shape == (num_rows, n)


@pytest.mark.parametrize("small", [True, False], ids=["decode", "prefill"])
@every_format
def test_the_heuristics_tiles(name, small):
    """Small groups have many loads in flight; every tile that `tune` times fits, for any K up to that of Kimi K3."""
    for k in (256, 2688, 7168):
        asked = problem("fwd", 176 if small else 90112, (512, k, 1024), "bfloat16", rhs=Operand(name), device=H200)
        first, *others = widen_tiles(asked)
        assert all(widen_tile_fits(tile, asked) for tile in (first, *others))
        bits = WIDENINGS[name].step_bytes() * 8 // STEP
        if small and k < 7168:
            assert first.stages * first.features * STEP * bits // 8 >= 2**16
            assert first.rows == 16
        if not small and k < 7168:
            assert first.features * first.rows >= 128 * 128


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"contraction": "dgrad"}, "its kernel for bfloat16 x mxfp4 computes only fwd: XlaBackend"),
        ({"lhs": Operand("float16"), "out": Operand("float16")}, "widens codes to bfloat16.*cast the rows"),
        ({"k": 192}, "k=192 of a weight in mxfp4 is not a positive multiple of 128"),
        ({"n": 96}, "n=96 is not a positive multiple of 64"),
        ({"k": 2**17}, "the scales of K=131072 in mxfp4 do not fit"),
        ({"num_rows": 0}, "num_rows=0 must be"),
        ({"num_experts": 0}, "num_experts=0 must be"),
        ({"device": CPU}, "for NVIDIA Hopper GPUs"),
    ],
)
def test_refuses(changes, reason):
    asked = problem("fwd", 24, (8, 128, 128), "bfloat16", rhs=Operand("mxfp4"), device=H200)
    with pytest.raises(UnsupportedError, match=reason):
        select(dataclasses.replace(asked, **changes), PallasBackend())


def test_auto_takes_it_and_leaves_gradients_and_other_widths_to_xla(install_library):
    """Where the compiled library has no kernels that widen codes."""
    install_library(library(*PLAIN))
    asked = problem("fwd", 24, (8, 128, 128), "bfloat16", rhs=Operand("mxfp4"), device=H200)
    assert "tile: PallasWidenTile(features=128, rows=16" in explain(asked)
    for changes in ({"contraction": "dgrad"}, {"k": 192}):
        assert explain(dataclasses.replace(asked, **changes)).endswith(
            "XlaBackend(method='blocked', block_rows=None) runs it"
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": 64}, "features=64 must be 128 or 256"),
        ({"rows": 12}, "rows=12 must be a multiple of 8"),
        ({"rows": 200}, "rows=200 must be a multiple of 8, at most 192, for features=128"),
        ({"features": 256, "rows": 72}, "rows=72 must be a multiple of 8, at most 64, for features=256"),
        ({"stages": 0}, "stages=0 must be"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PallasWidenTile(**settings)


def test_what_a_problem_does_not_say_is_checked(rng):
    """A tile that is too large for the scales of K, scales of another dtype, parts of odd widths."""
    rows, w, _, _ = operands(rng, "nvfp4", 256, 64)
    sizes = jnp.asarray(UNEVEN)
    with pytest.raises(ConfigError, match="of shared memory with the scales of K=256, more than 231424: lower stages"):
        matmul_widened(rows, w, sizes, tile=PallasWidenTile(stages=40), num_sms=1)
    wide = ScaledArray(w.codes, w.scales | {"block": w.scales["block"].astype(jnp.float32)}, "nvfp4")
    with pytest.raises(InputError, match=r"scales\['block'\] of nvfp4 are float32, not uint8"):
        matmul_widened(rows, wide, sizes, tile=PallasWidenTile(), num_sms=1)
    _, odd, _, _ = operands(rng, "nvfp4", 256, 96, parts=2)
    with pytest.raises(InputError, match="each of the 2 parts of w has 96 columns, not a multiple of 64"):
        matmul_widened(rows, odd, sizes, tile=PallasWidenTile(), num_sms=1)
