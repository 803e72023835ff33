"""The encoders of rows on the CPU: custom_calls/src/formats, compiled by the host's compiler (tests/emulation)."""

import ctypes
import functools

import jax
import numpy as np

from jax_latent_moe import native
from tests.emulated import aligned, compiled, in_turn

SOURCES = ("float32", "bfloat16", "float16")


class RowCodes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales")),
        ("rows", ctypes.c_int64),
        ("k", ctypes.c_int),
        ("power_of_two", ctypes.c_bool),
    )


class EncodeRows(ctypes.Structure):
    _fields_ = (("source", ctypes.c_int), ("values", ctypes.c_void_p), ("to", RowCodes))


class Relu2Gradient(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("dhidden", "hidden", "row_weights", "dpre", "row_weight_sums")),
        ("to", RowCodes),
    )


def call(target, operands, results, *, input_output_aliases=None, **attributes):
    """In place of `native.call`."""
    del input_output_aliases  # the kernel runs in place in any case
    run = {"encode_rows": _encode, "relu2_gradient": _gradient}[target]
    native._check_buffers(target, "operands", operands)
    native._check_buffers(target, "results", results)
    assert attributes.keys() == native.INTERFACE[target]["attributes"].keys()
    return list(jax.pure_callback(functools.partial(in_turn, run, results, attributes), list(results), *operands))


def _garbage(results):
    return [aligned(np.full(result.shape, 77, np.uint8).astype(result.dtype)) for result in results]


def _row_codes(like, codes, scales, power_of_two):
    return RowCodes(codes.ctypes.data, scales.ctypes.data, *like.shape, power_of_two)


def _encode(results, attributes, rows):
    rows, (codes, scales) = aligned(rows), _garbage(results)
    to = _row_codes(rows, codes, scales, **attributes)
    given = EncodeRows(SOURCES.index(rows.dtype.name), rows.ctypes.data, to)
    compiled("encode_rows").encode_rows(ctypes.byref(given))
    return codes, scales


def _gradient(results, attributes, dhidden, hidden, row_weights):
    dpre, hidden, row_weights = map(aligned, (dhidden, hidden, row_weights))
    codes, scales, sums = _garbage(results[1:])
    arrays = (array.ctypes.data for array in (dpre, hidden, row_weights, dpre, sums))
    to = _row_codes(dpre, codes, scales, **attributes)
    compiled("encode_rows").relu2_gradient(ctypes.byref(Relu2Gradient(SOURCES.index(dpre.dtype.name), *arrays, to)))
    return dpre, codes, scales, sums
