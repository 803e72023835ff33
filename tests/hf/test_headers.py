"""Headers are read as by the safetensors package, or refused with one error, in linear time."""

import json
import pathlib
import time

import hypothesis
import hypothesis.strategies as st
import pytest
from safetensors import SafetensorError, safe_open

from jax_latent_moe import hf
from jax_latent_moe.hf.folder import TensorFolder
from jax_latent_moe.hf.tensor_file import DTYPES, parse_json, read_header

MANY = 100_000
SECONDS = 10
"""Seconds of this process. Linear work takes less than one; quadratic work took over a minute."""


def write(path: pathlib.Path, header: bytes, data: bytes = b"", length: int | None = None):
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def within_seconds(read, *arguments):
    """The error of reading the file."""
    started = time.process_time()
    with pytest.raises(hf.CheckpointError) as caught:
        read(*arguments)
    assert time.process_time() - started < SECONDS
    assert len(str(caught.value)) < 200 * MANY
    return str(caught.value)


def entry(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_one_key_of_many_twice(tmp_path):
    text = json.dumps({f"t{i}": entry(0, 0) for i in range(MANY)})
    write(tmp_path / "x", f'{text[:-1]}, "t7": {json.dumps(entry(0, 0))}}}'.encode())
    assert within_seconds(read_header, tmp_path / "x").endswith("it names 't7' twice.")


def test_every_key_twice(tmp_path):
    text = json.dumps({f"t{i}": entry(0, 0) for i in range(MANY)})
    write(tmp_path / "x", f"{text[:-1]}, {text[1:]}".encode())
    message = within_seconds(read_header, tmp_path / "x")
    assert message.endswith(f"'t9' and {MANY - 10} more twice.")


def test_a_key_of_an_object_in_the_header_twice(tmp_path):
    pairs = ", ".join(f'"k{i % (MANY - 1)}": 0' for i in range(MANY))
    write(tmp_path / "x", f'{{"t": {{{pairs}}}}}'.encode())
    assert "it names 'k0' twice" in within_seconds(read_header, tmp_path / "x")


@pytest.mark.parametrize("size", [2**62, 2**70, 10**4000])
def test_a_shape_without_end(size, tmp_path):
    write(tmp_path / "x", json.dumps({"t": entry(0, 1, shape=[size] * (MANY // len(str(size)) * 10))}).encode())
    assert "is not a list of at most 64 integers from 0 to 2^63 - 1" in within_seconds(read_header, tmp_path / "x")


def test_many_tensors_that_overlap(tmp_path):
    write(tmp_path / "x", json.dumps({f"t{i}": entry(0, 1) for i in range(MANY)}).encode(), b"x")
    assert "overlap or leave holes" in within_seconds(read_header, tmp_path / "x")


def test_an_index_with_a_file_for_each_tensor(tmp_path):
    weight_map = {f"t{i}": f"{i}.safetensors" for i in range(MANY)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for i in range(1000):
        write(tmp_path / f"{i}.safetensors", json.dumps({f"t{i}": entry(0, 0)}).encode())
    assert "No such file" in within_seconds(lambda: TensorFolder(tmp_path).locate(weight_map))


# Names and values that are nearly valid: a tensor of each dtype and shape, moved, cut or of another type.
names = st.sampled_from(["a", "b.weight", "", "__metadata__", "é", "\ud800"]) | st.text(max_size=3)
sizes = st.integers(0, 4) | st.sampled_from([-1, 2**31, 2**63, 2**64, 10**30, True, 1.0, "1", None])
shapes = st.lists(sizes, max_size=3) | st.sampled_from([None, 3, "x", {}, [0] * 65, [1] * 64])
dtypes = st.sampled_from([*DTYPES, "F4", "C64", "f32", 1, None, []])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
entries = anything | st.fixed_dictionaries(
    {"dtype": dtypes, "shape": shapes, "data_offsets": st.lists(sizes, min_size=1, max_size=3) | anything}
)


@st.composite
def nearly_valid(draw):
    """(header, bytes of data) of consecutive tensors, at most one of which is random."""
    header, end = {}, 0
    for name in draw(st.lists(names.filter("__metadata__".__ne__), max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(list(DTYPES))), draw(st.lists(st.integers(0, 3), max_size=3))
        nbytes = DTYPES[dtype].itemsize
        for size in shape:
            nbytes *= size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2))
    if draw(st.booleans()):
        header[draw(names)] = draw(entries)
    return header, end + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 100]))


def read_by_the_package(path):
    """(dtype, shape) by name, or None if the safetensors package refuses the file."""
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is not a dictionary)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, UnicodeError):
        return None


def attempt(read, *arguments):
    """(result, None) or (None, CheckpointError)."""
    try:
        return read(*arguments), None
    except hf.CheckpointError as error:
        return None, error


@hypothesis.given(nearly_valid())
@hypothesis.settings(max_examples=300)
def test_a_header_is_read_as_the_safetensors_package_reads_it(tmp_path_factory, drawn):
    header, size = drawn
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    write(path, json.dumps(header).encode(), bytes(max(size, 0)))
    theirs = read_by_the_package(path)
    read, error = attempt(read_header, path)
    if read is None:
        assert str(path) in str(error)
        assert theirs is None or any(dtype not in DTYPES for dtype, _ in theirs.values()), error
        return
    ours = {name: (info.dtype, info.shape) for name, info in read.items()}
    metadata = header.get("__metadata__", {})
    strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if strings and "\ud800" not in header:  # the package refuses other metadata, and names that are not UTF-8
        assert ours == theirs
    assert sum(info.nbytes for info in read.values()) == max(size, 0)


@hypothesis.given(st.binary(max_size=60) | anything.map(lambda value: json.dumps(value).encode()), st.integers(-2, 70))
@hypothesis.settings(max_examples=300)
def test_any_bytes_are_an_object_or_an_error(tmp_path_factory, data, length):
    path = tmp_path_factory.mktemp("bytes") / "x"
    write(path, data, b"", max(length, 0) if length > 60 else None)
    for read, argument in ((read_header, (path,)), (parse_json, ("it", data))):
        value, error = attempt(read, *argument)
        assert isinstance(value, dict) or error.problems
