"""The kernels for few tokens on the CPU: custom_calls/src/decode, compiled by the host's compiler (tests/emulation)."""

import ctypes
import functools
import os
import pathlib
import shutil
import subprocess
import tempfile
import threading

import jax
import numpy as np

from jax_latent_moe import native
from jax_latent_moe.varying import varying

ROOT = pathlib.Path(__file__).parent.parent
CODES = ("dense", "e4m3", "int8", "mxfp4", "nvfp4", "int4")
ACTIVATIONS = ("none", "relu2", "gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh", "situ_glu")
WHOLE_AXIS = 31
SMS = 2
"""SMs of the emulated device. With so few, all but the smallest experts run in the kernels for many blocks."""
ONE_AT_A_TIME = threading.Lock()
"""The emulated blocks are in global variables."""


class Weight(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("data", "scales", "more")),
        *((name, ctypes.c_int) for name in ("parts", "n", "k", "n_shift", "k_shift")),
    )


class Product(ctypes.Structure):
    _fields_ = (
        ("weight", Weight),
        ("format", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("rows", "ids")),
        *((name, ctypes.c_int) for name in ("assignments", "choices", "experts")),
        ("distinct", ctypes.c_bool),
        ("depth", ctypes.c_int),
        ("counters", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("activation", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("beta", "linear_beta")),
        ("num_counters", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("choice_weights", "partial")),
        ("splits", ctypes.c_int),
        ("out", ctypes.c_void_p),
    )


class Listed(ctypes.Structure):
    _fields_ = (
        ("product", Product),
        *((name, ctypes.c_void_p) for name in ("starts", "list")),
        *((name, ctypes.c_int) for name in ("pass", "num_sms")),
        *((name, ctypes.c_int64) for name in ("codes_apart", "scales_apart")),
        *((name, ctypes.c_int) for name in ("scales_begin", "scales_row", "scales_half", "scales_gap_shift")),
    )


def cuda_headers() -> pathlib.Path | None:
    """The folder of CUDA's headers, of the machine or of the compiler that scripts/build-cuda.sh fetched."""
    compilers = [ROOT / ".tools/cuda/nvcc/nvidia/cu13/bin/nvcc"]
    compilers += [pathlib.Path(os.path.realpath(path)) for path in (shutil.which("nvcc"),) if path]
    compilers += [pathlib.Path(home, "bin/nvcc") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    folders = (compiler.parent.parent / "include" for compiler in compilers)
    return next((folder for folder in folders if (folder / "cuda_fp8.h").is_file()), None)


def missing() -> str | None:
    """Why the kernels cannot be compiled here; None if they can."""
    if not (ROOT / "custom_calls/src/decode").is_dir():
        return "there are no sources of the library here"
    if shutil.which("g++") is None:
        return "there is no g++"
    return None if cuda_headers() else "there are no headers of CUDA"


def kernels() -> ctypes.CDLL:
    """The compiled kernels."""
    return compiled("experts")


@functools.cache
def compiled(name: str) -> ctypes.CDLL:
    """The kernels of a source of tests/emulation, compiled."""
    headers = cuda_headers()
    assert headers is not None
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, f"{name}.so")
        include = ["-I", ROOT / "tests/emulation", "-I", ROOT / "custom_calls/src", "-isystem", headers]
        source = ROOT / f"tests/emulation/{name}.cc"
        subprocess.run(
            [
                "g++",
                "-std=c++20",
                "-O2",
                "-shared",
                "-fPIC",
                "-w",
                "-fno-strict-aliasing",
                "-U_FORTIFY_SOURCE",
                *include,
                source,
                "-o",
                path,
            ],
            check=True,
        )
        return ctypes.CDLL(str(path))


def call(target, operands, results, **attributes):
    """In place of `native.call`."""
    targets = dict(
        decode_experts=_run,
        decode_listed_experts=_run_listed,
        decode_projections=_project,
        decode_token=_run_token,
        top_k=_choose_alone,
        top_k_weights=_choose,
    )
    run = targets[target]
    native._check_buffers(target, "operands", operands)
    native._check_buffers(target, "results", results)
    assert attributes.keys() == native.INTERFACE[target]["attributes"].keys()
    program = functools.partial(in_turn, run, results, attributes)
    found = jax.pure_callback(program, list(results), *operands, vmap_method="sequential")
    return varying(list(found), operands)


def in_turn(run, results, attributes, *operands):
    """Runs kernels on arrays, which devices may ask for at the same time."""
    arrays = [np.asarray(operand) for operand in operands]  # waits for them, perhaps for another device's callback
    with ONE_AT_A_TIME:
        return run(results, attributes, *arrays)


def aligned(array) -> np.ndarray:
    """A copy at a multiple of 16 bytes."""
    array = np.asarray(array)
    buffer = np.empty(array.nbytes + 16, np.uint8)
    start = -buffer.ctypes.data % 16
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _shift(size, blocks):
    return WHOLE_AXIS if blocks == 1 else next(shift for shift in (0, 4, 5, 7) if -(-size // (1 << shift)) == blocks)


def _weight(code, data, scales, more, parts, k, n):
    found = Weight(CODES.index(code), data.ctypes.data, scales.ctypes.data, more.ctypes.data, parts, n, k)
    found.more = more.ctypes.data if more.size else None
    if code != "dense":
        found.n_shift, found.k_shift = (_shift(size, scales.shape[axis]) for size, axis in ((n, 2), (k, 3)))
    return found


def _run(results, attributes, *operands, distinct=False):
    tokens, ids, weights, *stored, up_proj = map(aligned, operands)
    garbage = [np.full(result.shape, 77, np.uint8).astype(result.dtype) for result in results]
    out, hidden, partial, counters, projected = map(aligned, garbage)
    parts = 2 if ACTIVATIONS.index(attributes["activation"]) >= ACTIVATIONS.index("swiglu") else 1
    (width,), inner = tokens.shape[1:], hidden.shape[1]
    product = Product(
        format=1 if tokens.dtype == np.float16 else 0,
        rows=tokens.ctypes.data,
        ids=ids.ctypes.data,
        assignments=ids.size,
        choices=ids.shape[1],
        experts=stored[3].shape[0],
        distinct=distinct,
        depth=width,
        counters=counters.ctypes.data,
        hidden=hidden.ctypes.data,
        activation=ACTIVATIONS.index(attributes["activation"]),
        beta=attributes["beta"],
        linear_beta=attributes["linear_beta"],
        num_counters=counters.size,
        weight=_weight(attributes["in_code"], *stored[:3], parts, width, inner),
    )
    kernels().multiply_experts(ctypes.byref(product), SMS)
    product.weight = _weight(attributes["out_code"], *stored[3:], 1, inner, width)
    product.rows, product.depth = hidden.ctypes.data, -(-inner // (128 * partial.shape[1])) * 128
    product.choice_weights, product.partial = weights.ctypes.data, partial.ctypes.data
    product.splits, product.out = partial.shape[1], out.ctypes.data
    kernels().multiply_experts(ctypes.byref(product), SMS)
    if up_proj.shape[1]:
        _multiply_projections(out, None, up_proj, None, projected, attributes["parts"])
    return out, hidden, partial, counters, projected


def _run_token(results, attributes, x, kernel, projection, bias, *others):
    """What custom_calls/src/ffi/decode_token.cc launches."""
    shapes = dict(zip(native.INTERFACE["decode_token"]["results"], results, strict=True))
    logits, latent = _project(
        [shapes["logits"], shapes["latent"]], {"parts": attributes["parts"]}, x, kernel, projection
    )
    bias = aligned(bias)
    ids, weights = (aligned(np.zeros(shapes[name].shape, shapes[name].dtype)) for name in ("expert_ids", "weights"))
    scores = Scores(logits.ctypes.data, bias.ctypes.data if bias.size else None, attributes["by_sigmoid"])
    weighing = {name: attributes[name] for name in ("sigmoid", "eps", "factor")}
    _choose_of_few(scores, logits.shape[1], ids, Weighing(logits.ctypes.data, weights.ctypes.data, **weighing))
    experts = {name: attributes[name] for name in ("in_code", "out_code", "activation", "beta", "linear_beta")}
    tokens = latent if projection.shape[1] else x
    rest = _run(results[4:], dict(experts, parts=attributes["up_parts"]), tokens, ids, weights, *others, distinct=True)
    return logits, latent, ids, weights, *rest


def _run_listed(results, attributes, *operands):
    tokens, ids, weights, *stored = map(aligned, operands)
    garbage = [np.full(result.shape, 77, np.uint8).astype(result.dtype) for result in results]
    out, hidden, partial, lists = map(aligned, garbage)
    hidden[:], partial[:] = np.nan, np.nan  # a row of no expert is not written, and must not be read
    parts = 2 if ACTIVATIONS.index(attributes["activation"]) >= ACTIVATIONS.index("swiglu") else 1
    (width,), inner, experts = tokens.shape[1:], hidden.shape[1], stored[3].shape[0]
    product = Product(
        rows=tokens.ctypes.data,
        ids=ids.ctypes.data,
        assignments=ids.size,
        choices=ids.shape[1],
        experts=experts,
        hidden=hidden.ctypes.data,
        activation=ACTIVATIONS.index(attributes["activation"]),
        beta=attributes["beta"],
        linear_beta=attributes["linear_beta"],
        weight=_weight(attributes["in_code"], *stored[:3], parts, width, inner),
    )
    starts = lists.ctypes.data
    memory = starts, starts + 4 * (experts + 1), attributes["rows"], attributes["sms"]
    first = Listed(product, *memory)
    product.weight = _weight(attributes["out_code"], *stored[3:], 1, inner, width)
    product.rows, product.choice_weights = hidden.ctypes.data, weights.ctypes.data
    product.partial, product.out = partial.ctypes.data, out.ctypes.data
    compiled("listed").multiply_listed(ctypes.byref(first), ctypes.byref(Listed(product, *memory)))
    return out, hidden, partial, lists


class Weighing(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "weights")),
        ("sigmoid", ctypes.c_bool),
        *((name, ctypes.c_float) for name in ("eps", "factor")),
    )


class Scores(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in ("values", "bias")), ("sigmoid", ctypes.c_bool))


FEW_ROWS, MOST_WEIGHTS = 256, 32


def _choose(results, attributes, scores, logits):
    scores, logits = map(aligned, (scores, logits))
    ids, weights = (aligned(np.zeros(result.shape, result.dtype)) for result in results)
    weighing = Weighing(logits.ctypes.data, weights.ctypes.data, **attributes)
    _run_choose(scores, ids, weighing)
    return ids, weights


def _choose_alone(results, attributes, scores):
    scores, ids = aligned(scores), aligned(np.zeros(results[0].shape, np.int32))
    _run_choose(scores, ids, Weighing(**attributes))
    return (ids,)


def _run_choose(scores, ids, weighing):
    rows, columns = scores.shape
    pointers = ctypes.c_void_p(scores.ctypes.data), ctypes.c_void_p(ids.ctypes.data)
    if rows <= FEW_ROWS and ids.shape[1] <= MOST_WEIGHTS:
        _choose_of_few(Scores(scores.ctypes.data, None, False), columns, ids, weighing)
    else:
        assert columns <= 512
        kernels().choose(*pointers, rows, columns, ids.shape[1], ctypes.byref(weighing))


def _choose_of_few(scores, columns, ids, weighing):
    arguments = ctypes.c_void_p(ids.ctypes.data), ids.shape[0], columns, ids.shape[1]
    kernels().choose_of_few(ctypes.byref(scores), *arguments, ctypes.byref(weighing))


class Projections(ctypes.Structure):
    _fields_ = (
        ("format", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("k", ctypes.c_int),
        ("kernel", ctypes.c_void_p),
        ("is_kernel_float32", ctypes.c_bool),
        ("experts", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("logits", "projection")),
        ("width", ctypes.c_int),
        ("out", ctypes.c_void_p),
        ("parts", ctypes.c_int),
    )


def _project(results, attributes, x, kernel, projection):
    x, kernel, projection = map(aligned, (x, kernel, projection))
    logits, out = (aligned(np.full(result.shape, np.nan).astype(result.dtype)) for result in results)
    _multiply_projections(x, kernel, projection, logits, out, **attributes)
    return logits, out


def _multiply_projections(x, kernel, projection, logits, out, parts):
    given = Projections(
        format=1 if x.dtype == np.float16 else 0,
        x=x.ctypes.data,
        k=x.shape[1],
        kernel=None if kernel is None else kernel.ctypes.data,
        is_kernel_float32=kernel is not None and kernel.dtype == np.float32,
        experts=0 if kernel is None else kernel.shape[1],
        logits=None if logits is None else logits.ctypes.data,
        projection=projection.ctypes.data,
        width=projection.shape[1],
        out=out.ctypes.data,
        parts=parts,
    )
    compiled("projections").multiply_projections(ctypes.byref(given))


def widened(code: str, word: int, scale: int = 0, zero: int = 0) -> np.ndarray:
    """The values that the kernels make of a 32-bit word of codes, before what multiplies sums."""
    found = np.empty(4 if code in ("e4m3", "int8") else 8, np.float32)
    kernels().widen(CODES.index(code), ctypes.c_uint32(word), scale, zero, ctypes.c_void_p(found.ctypes.data))
    return found
