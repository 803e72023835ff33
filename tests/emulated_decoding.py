"""The kernel that decodes a weight on the CPU: custom_calls/src/formats, compiled by the host's compiler."""

import ctypes
import functools

import jax
import numpy as np

from jax_latent_moe import native
from tests import emulated
from tests.emulated import aligned, compiled, in_turn


class DecodeWeight(ctypes.Structure):
    _fields_ = (
        ("weight", emulated.Weight),
        *((name, ctypes.c_int) for name in ("features", "first", "width", "format")),
        ("out", ctypes.c_void_p),
    )


def call(target, operands, results, **attributes):
    """In place of `native.call`."""
    assert target == "decode_weight"
    native._check_buffers(target, "operands", operands)
    native._check_buffers(target, "results", results)
    assert attributes.keys() == native.INTERFACE[target]["attributes"].keys()
    return list(jax.pure_callback(functools.partial(in_turn, _decode, results, attributes), list(results), *operands))


def _decode(results, attributes, *stored):
    codes, scales, more = map(aligned, stored)
    out = aligned(np.full(results[0].shape, 77, results[0].dtype))
    _, parts, n, width = codes.shape
    k = width * (1 if attributes["code"] in ("e4m3", "int8") else 2)
    weight = emulated._weight(attributes["code"], codes, scales, more, parts, k, n)
    _, features, columns = out.shape
    format = 0 if out.dtype.name == "bfloat16" else 1
    given = DecodeWeight(weight, out.shape[0] * features, attributes["first"], columns, format, out.ctypes.data)
    compiled("decode_weight").decode_weight(ctypes.byref(given))
    return (out,)
