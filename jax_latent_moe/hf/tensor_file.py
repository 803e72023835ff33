"""Reads and writes the safetensors format: eight bytes of header length, a JSON header, then the tensors' bytes.

The safetensors package is not used, to save memory and to give better errors. Tensors go through one small buffer
straight to their place in a stacked array. Duplicate keys, holes and oversized headers are refused, and the error names
the file. Format: https://github.com/huggingface/safetensors#format
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import reprlib
import stat
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_latent_moe.errors import CheckpointError

DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
    **{
        f"{kind}{8 * size}": np.dtype(f"{code}{size}")
        for kind, code in (("I", "i"), ("U", "u"))
        for size in (1, 2, 4, 8)
    },
    "BOOL": np.dtype("bool"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000
"""Bytes; the safetensors package has the same limit."""
JSON_LIMIT = 1_000_000_000
"""Bytes of a JSON file."""
SHOWN = 10
"""The most names that a message lists."""
MOST_DIMENSIONS = 64
"""NumPy's limit for an array. It also bounds the time to multiply the sizes."""


class TensorInfo(NamedTuple):
    """A tensor's place in a file.

    Attributes:
        file: path of the file.
        dtype: the format's name of the dtype ("BF16").
        shape: the tensor's dimensions.
        start: offset of the tensor's first byte in the file.
    """

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def as_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """The argument as a path; CheckpointError if it is not a path, or no file can have that name."""
    try:
        shown = repr(os.fspath(path))
    except TypeError:
        raise CheckpointError(repr(path), ["it must be a path: a string or a pathlib.Path."]) from None
    try:
        if b"\0" in os.fsencode(path):
            raise CheckpointError(shown, ["it holds a NUL character, which no file name may contain: remove it."])
    except UnicodeEncodeError as error:
        raise CheckpointError(shown, [f"the system cannot encode the name ({error}): change it."]) from error
    return pathlib.Path(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is absent or too large, is not a JSON object, or names a key twice.
    """
    with opened(path) as file:
        if os.fstat(file.fileno()).st_size > JSON_LIMIT:
            raise CheckpointError(path, [f"it holds more than {JSON_LIMIT} bytes of JSON, the limit for such a file."])
        return parse_json(path, file.read())


def parse_json(where: object, data: bytes) -> dict[str, Any]:
    """The JSON object in data; CheckpointError about `where` if data is not a JSON object."""

    def unique(pairs):
        values = dict(pairs)
        if len(values) < len(pairs):
            repeated = [key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1]
            more = f" and {len(repeated) - SHOWN} more" if len(repeated) > SHOWN else ""
            raise ValueError(f"it names {', '.join(map(repr, repeated[:SHOWN]))}{more} twice")
        return values

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(where, [f"not valid JSON: {error}."]) from error
    if not isinstance(value, dict):
        raise CheckpointError(where, [f"it holds a JSON {type(value).__name__}, expected an object."])
    return value


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a regular file for unbuffered reading. An OSError becomes a CheckpointError."""
    try:
        # The check comes first, because opening a pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(path, ["not a regular file."])
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise CheckpointError(path, [f"cannot be read: {error.strerror or error}."]) from error


def read_header(path: pathlib.Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: the file is absent or truncated, or its header is not valid.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or 8 + length > size:
            raise CheckpointError(path, [f"truncated, or not a safetensors file: {size} bytes cannot hold its header."])
        if length > HEADER_LIMIT:
            raise CheckpointError(path, [f"its header has {length} bytes, over the limit of {HEADER_LIMIT}."])
        header = parse_json(f"{path} (header)", file.read(length))
    header.pop("__metadata__", None)
    begin = 8 + length
    tensors, problems, spans = {}, [], []
    for name, entry in header.items():
        problem = _invalid_entry(entry)
        if problem:
            problems.append(f"{name}: {problem}.")
            continue
        first, last = entry["data_offsets"]
        tensors[name] = TensorInfo(path, entry["dtype"], tuple(entry["shape"]), begin + first)
        spans.append((first, last, name))
    end = 0
    for first, last, name in sorted(spans) if not problems else ():
        if first != end:
            problems.append(f"{name}: its bytes begin at {first}, expected {end}: tensors overlap or leave holes.")
        end = last
    if not problems and begin + end != size:
        what = "truncated" if size < begin + end else "longer than its header says"
        problems.append(f"{what}: the file has {size} bytes, its header needs {begin + end}.")
    if problems:
        raise CheckpointError(path, problems)
    return tensors


def _invalid_entry(entry) -> str | None:
    """Why a header entry is invalid; None if it is valid."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "not an object of dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {_short(dtype)} is not one of {', '.join(DTYPES)}"
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(map(_is_size, shape)):
        return f"shape {_short(shape)} is not a list of at most {MOST_DIMENSIONS} integers from 0 to 2^63 - 1"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        return f"data_offsets {_short(offsets)} are not two integers from 0 to 2^63 - 1"
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    found = offsets[1] - offsets[0]
    if found != expected:
        return f"{dtype} of shape {shape} takes {expected} bytes, but data_offsets {offsets} span {found}"
    return None


def _is_size(value) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _short(value) -> str:
    """A value from a file, cut to a few dozen characters."""
    return reprlib.repr(value)


def read_bytes(file: BinaryIO, info: TensorInfo, offset: int, buffer: np.ndarray) -> None:
    """Fills a contiguous buffer with the bytes of a tensor from byte `offset` of the tensor on.

    Raises:
        CheckpointError: the file ends before the buffer is full.
    """
    view, position = memoryview(buffer.reshape(-1).view(np.uint8)), info.start + offset
    while view:
        count = os.preadv(file.fileno(), [view], position)
        if count == 0:
            raise CheckpointError(info.file, [f"the file was truncated while it was read: it ends at byte {position}."])
        view, position = view[count:], position + count


def read_tensor(file: BinaryIO, info: TensorInfo) -> np.ndarray:
    """Reads a whole tensor, as stored."""
    raw = np.empty(info.nbytes, np.uint8)
    read_bytes(file, info, 0, raw)
    return raw.view(DTYPES[info.dtype]).reshape(info.shape)


def read_part(file: BinaryIO, info: TensorInfo, expert: int | None) -> np.ndarray:
    """Reads one expert's part of a tensor whose first axis is the experts, or the whole tensor if expert is None."""
    if expert is None:
        return read_tensor(file, info)
    part = np.empty(info.shape[1:], DTYPES[info.dtype])
    read_bytes(file, info, expert * part.nbytes, part)
    return part


def create(path: pathlib.Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Creates a safetensors file whose data is zero, and returns the place of each tensor.

    Args:
        path: the file to create.
        tensors: (dtype, shape) by the tensor's name, in the order of the file.
    """
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the data
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    return read_header(path)


def write_bytes(file: BinaryIO, info: TensorInfo, offset: int, data: np.ndarray) -> None:
    """Overwrites the bytes of a tensor from byte `offset` of the tensor on."""
    view, position = memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8)), info.start + offset
    while view:
        count = os.pwrite(file.fileno(), view, position)
        view, position = view[count:], position + count
