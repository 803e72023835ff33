"""Codes that warps of a Hopper kernel widen in registers, emulated on the CPU."""

import ctypes

import ml_dtypes
import numpy as np
import pytest

from tests import emulated
from tests.oracle.formats import unpacked

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=f"{emulated.missing()}")
BFLOAT16 = ml_dtypes.bfloat16
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def repeated(scales, n, k):
    """Scales [..., blocks, blocks] for each of N x K elements."""
    for axis, size in ((-2, n), (-1, k)):
        scales = np.repeat(scales, -(-size // scales.shape[axis]), axis)
        scales = np.take(scales, np.arange(size), axis)
    return scales


def e4m3(codes):
    return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def e2m1(codes):
    return np.where(codes & 8, -1.0, 1.0) * E2M1[codes & 7]


def stored(rng, code, shape, group=None, ordinary=False):
    """(codes, scales, more, the widened values as float64) of random bytes; the sums lack the other scales.

    The kernels multiply by most narrow scales in one way. If not `ordinary`, some are other ones: NaN among them, and
    negative ones of nvfp4.
    """
    experts, parts, n, k = shape
    few = experts, parts
    if code in ("e4m3", "int8"):
        codes = rng.integers(0, 256, shape).astype(np.uint8)
        blocks = (-(-n // 128), -(-k // 128)) if group == 128 else (n, 1)
        scales = rng.lognormal(0, 3, (*few, *blocks)).astype(np.float32)
        values = e4m3(codes) if code == "e4m3" else codes.view(np.int8).astype(np.float64)
        if group == 128:
            whole = np.repeat(np.repeat(scales, 128, 2), 128, 3)[:, :, :n, :k]
            values = (values * whole).astype(np.float32)
        return codes.view(np.int8) if code == "int8" else codes, scales, np.zeros(0, np.float32), values
    codes = rng.integers(0, 256, (*few, n, k // 2)).astype(np.uint8)
    values = unpacked(code, codes)
    if code == "mxfp4":
        scales = rng.integers(*((0, 129) if ordinary else (0, 256)), (*few, n, k // 32)).astype(np.uint8)
        powers = np.where(scales == 255, np.nan, np.ldexp(1.0, scales.astype(int) - 127))
        return codes, scales, np.zeros(0, np.float32), e2m1(values) * repeated(powers, n, k)
    if code == "nvfp4":
        scales = rng.integers(*((8, 127) if ordinary else (0, 256)), (*few, n, k // 16)).astype(np.uint8)
        if not ordinary:
            scales[rng.random(scales.shape) < 0.1] = 0x7F
        more = rng.lognormal(0, 3, (*few, 1, 1)).astype(np.float32)
        return codes, scales, more, e2m1(values) * repeated(e4m3(scales), n, k) / 1024
    scales = rng.lognormal(0, 3, (*few, n, k // group)).astype(BFLOAT16)
    if not ordinary:
        scales[rng.random(scales.shape) < 0.1] = np.nan
    zeros = rng.integers(0, 16, scales.shape).astype(np.uint8)
    values = values.astype(np.float64) - repeated(zeros, n, k)
    return codes, scales, zeros, values * repeated(scales.astype(np.float64), n, k)


def widened(code, codes, scales, more, k, groups=2):
    """The fragments of all tiles in order: [E, P, N, K], with N and K up to whole tiles and steps.

    A tile has 64 features for each of `groups` warpgroups.
    """
    codes, scales, more = map(emulated.aligned, (codes, scales, more))
    experts, parts, n, _ = codes.shape
    columns, steps = -(-n // (64 * groups)) * 64 * groups, -(-k // 128)
    weight = emulated._weight(code, codes, scales, more, parts, k, n)
    if code not in ("e4m3", "int8"):
        weight.n_shift, weight.k_shift = 0, int(np.log2(k // scales.shape[3]))
    found = np.full((experts, parts, columns, 128 * steps), 0x7777, np.uint16)
    emulated.compiled("widened").widen(
        ctypes.byref(weight), experts, groups, columns, steps, ctypes.c_void_p(found.ctypes.data)
    )
    return found.view(BFLOAT16), weight


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("ordinary", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("code", "group"),
    [("e4m3", None), ("e4m3", 128), ("int8", None), ("mxfp4", None), ("nvfp4", None), ("int4", 32), ("int4", 128)],
)
def test_fragments_hold_the_decoded_weights(rng, code, group, parts, ordinary, groups):
    """To the bit, also where the tile does not divide the columns. Beyond the contracted axis numbers are finite."""
    few = {("e4m3", 128): 192, ("int4", 128): 128}.get((code, group), 96)
    for n, k in ((136, 256), (200, 384), (8, few)):
        codes, scales, more, values = stored(rng, code, (2, parts, n, k), group, ordinary)
        found, _ = widened(code, codes, scales, more, k, groups)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = values.astype(np.float32).astype(BFLOAT16)
        same = found[:, :, :n, :k]
        np.testing.assert_array_equal(same.astype(np.float32), expected.astype(np.float32))
        assert np.isfinite(found[..., k:].astype(np.float32)).all()


@pytest.mark.parametrize("scale", [0, 7, 0x7F, 0x80, 0x88, 0xFE, 0xFF])
def test_one_scale_of_nvfp4_that_needs_more_than_an_addition(rng, scale):
    """All others of the warp do not."""
    codes, scales, _, _ = stored(rng, "nvfp4", (1, 1, 16, 128), ordinary=True)
    scales[0, 0, 11, 5] = scale
    found, _ = widened("nvfp4", codes, scales, np.ones((1, 1, 1, 1), np.float32), 128)
    values = e2m1(unpacked("mxfp4", codes)) * repeated(e4m3(scales), 16, 128) / 1024
    np.testing.assert_array_equal(found[:, :, :16].astype(np.float32), values.astype(BFLOAT16).astype(np.float32))


@pytest.mark.parametrize("scale", [0, 128, 129, 254, 255])
def test_one_scale_of_mxfp4_that_needs_two_factors(rng, scale):
    codes, scales, more, _ = stored(rng, "mxfp4", (1, 1, 16, 128), ordinary=True)
    scales[0, 0, 11, 2] = scale
    found, _ = widened("mxfp4", codes, scales, more, 128)
    powers = np.where(scales == 255, np.nan, np.ldexp(1.0, scales.astype(int) - 127))
    with np.errstate(over="ignore"):
        expected = (e2m1(unpacked("mxfp4", codes)) * repeated(powers, 16, 128)).astype(np.float32).astype(BFLOAT16)
    np.testing.assert_array_equal(found[:, :, :16].astype(np.float32), expected.astype(np.float32))


def test_int4_without_zero_points_has_8_as_zero(rng):
    codes, scales, zeros, _ = stored(rng, "int4", (2, 1, 24, 160), 32)
    found, _ = widened("int4", codes, scales, zeros[:0], 160)
    values = (unpacked("int4", codes) - 8.0) * repeated(scales.astype(np.float64), 24, 160)
    np.testing.assert_array_equal(
        found[:, :, :24, :160].astype(np.float32), values.astype(np.float32).astype(BFLOAT16).astype(np.float32)
    )


def test_sums_get_the_scales_of_columns_and_matrices(rng):
    scale = emulated.compiled("widened").scale_of_sum
    scale.restype, scale.argtypes = ctypes.c_float, [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    of = {}
    for code in ("int8", "e4m3", "nvfp4", "mxfp4"):
        n, group = (264, 128) if code == "e4m3" else (24, None)
        codes, scales, more, _ = stored(rng, code, (2, 2, n, 64), group)
        of[code] = (*widened(code, codes, scales, more, 64), scales, more)
    kept = [emulated.aligned(of[code][place]) for code, place in (("int8", 2), ("nvfp4", 3), ("e4m3", 2))]
    of["int8"][1].scales, of["nvfp4"][1].more, of["e4m3"][1].scales = (array.ctypes.data for array in kept)
    assert scale(ctypes.byref(of["e4m3"][1]), 3, 130) == kept[2][1, 1, 1, 0]
    assert scale(ctypes.byref(of["int8"][1]), 3, 17) == kept[0][1, 1, 17, 0]
    assert scale(ctypes.byref(of["nvfp4"][1]), 2, 17) == 1024 * kept[1][1, 0, 0, 0]
    assert scale(ctypes.byref(of["mxfp4"][1]), 2, 17) == 1
