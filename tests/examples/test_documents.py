"""Documents from files of every kind, in memory and from the cache, and the errors for damaged files."""

import gzip
import json
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from examples.train import corpus, documents, text
from examples.train.data import train_batches, validation_windows
from examples.train.errors import TrainError
from examples.train.text import Text

ROWS = ["first\nof two lines", "", "zwölf — 十二", "last"]
JOINED = "\n".join(row for row in ROWS if row).encode()
STARTS = [len(b"first\nof two lines"), JOINED.rindex(b"\n")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jax_latent_moe" / "text"


def lines(column: str = "text") -> bytes:
    return "\n".join(json.dumps({"id": 1, column: row}) for row in ROWS).encode() + b"\n\n"


def write(path, column: str = "text"):
    """The rows as a file of the kind that its name says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": [1] * 4, column: ROWS}), path, row_group_size=2)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines(column)))
    elif path.suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(lines(column))
    else:
        path.write_bytes(lines(column))
    return path


def whole(data, column="text") -> Text:
    """The text that was read, before its end is held out."""
    return corpus._of_files([data], column)


KINDS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]


@pytest.mark.parametrize("name", KINDS)
def test_each_row_is_a_document(tmp_path, cache, name):
    path = write(tmp_path / name, "content")
    read = whole(path, "content")
    assert read.tokens.tobytes() == JOINED
    assert read.starts.tolist() == STARTS
    assert isinstance(read.tokens, np.memmap), "what is packed is mapped from disk"
    (kept,) = cache.iterdir()
    before = kept.stat().st_mtime_ns
    assert whole(path, "content").tokens.tobytes() == JOINED
    assert kept.stat().st_mtime_ns == before, "made once"


def test_large_text_is_mapped_and_the_same(tmp_path, monkeypatch, rng):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "cab":
        (folder / f"{name}.txt").write_bytes(bytes(rng.integers(1, 256, 5000, np.uint8)))
    small = corpus.load_corpus(str(folder))
    monkeypatch.setattr(corpus, "IN_MEMORY", 1000)
    monkeypatch.setattr(documents, "PIECE", 700)
    large = corpus.load_corpus(str(folder))
    for part, other in ((large.train, small.train), (large.validation, small.validation)):
        assert isinstance(part.tokens, np.memmap)
        assert part.tokens.tobytes() == other.tokens.tobytes()
        assert part.starts.tolist() == other.starts.tolist()
    assert small.train.starts.tolist() == [5000, 10001]


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "a.jsonl")
    whole(path)
    path.write_text('{"text": "other"}')
    assert whole(path).tokens.tobytes() == b"other"


def test_two_processes_may_make_the_same_cache(tmp_path, cache, monkeypatch):
    """The other one is ready first."""
    path = write(tmp_path / "a.jsonl")
    appear = text._appear

    def late(partial, folder):
        folder.mkdir()
        for name in ("tokens", "starts"):
            (folder / name).write_bytes((partial / name).read_bytes())
        appear(partial, folder)

    monkeypatch.setattr(text, "_appear", late)
    assert whole(path).tokens.tobytes() == JOINED
    assert len(list(cache.iterdir())) == 1


def damaged_gzip(path):
    path.write_bytes(gzip.compress(lines() * 50)[:-30])


def damaged_zstd(path):
    path.write_bytes(b"(\xb5/\xfd no zstd")


@pytest.mark.parametrize(
    ("name", "make", "column", "sentence"),
    [
        (
            "a.parquet",
            lambda path: path.write_bytes(b"PAR1 broken"),
            "text",
            r"a\.parquet is not a readable Parquet file",
        ),
        ("a.parquet", write, "body", r"a\.parquet has no text in the column 'body'\. Columns with text: text\. Name"),
        ("a.parquet", write, "id", r"a\.parquet has no text in the column 'id'\. Columns with text: text\."),
        ("a.jsonl", write, "body", r"line 1 has no text in the field 'body'\. It holds id, text: name the field with"),
        ("a.jsonl", write, "id", r"a\.jsonl, line 1 has no text in the field 'id'"),
        ("a.jsonl", lambda path: path.write_text('{"text": "a"}\n{"text"'), "text", r"a\.jsonl, line 2 is not JSON"),
        (
            "a.jsonl",
            lambda path: path.write_text("[1]"),
            "text",
            r"line 1 has no text in the field 'text'\. It holds a list",
        ),
        ("a.jsonl.gz", damaged_gzip, "text", r"a\.jsonl\.gz is damaged"),
        ("a.jsonl.gz", lambda path: path.write_bytes(b"plain"), "text", r"a\.jsonl\.gz is damaged"),
        ("a.jsonl.zst", damaged_zstd, "text", r"a\.jsonl\.zst is damaged"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_sentence(tmp_path, cache, name, make, column, sentence):
    make(tmp_path / name)
    with pytest.raises(TrainError, match=sentence) as raised:
        corpus.load_corpus(str(tmp_path / name), column)
    assert "\n" not in str(raised.value)
    assert not list(cache.iterdir()), "nothing half made is left"


def test_without_pyarrow_the_package_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TrainError, match=r"a\.parquet needs the package pyarrow: pip install 'jax-latent-moe\[data\]'"):
        whole(path)


def test_batches_say_where_documents_begin():
    content = b"aaa\nbb\ncccccc\ndddd"
    starts = np.asarray([3, 6, 13])
    batches = train_batches(Text(np.frombuffer(content, np.uint8), starts), 4, 4, seed=0, documents=True)
    for _ in range(3):
        batch = next(batches)
        np.testing.assert_array_equal(batch.starts, batch.tokens == ord("\n"))
    assert next(train_batches(Text.of(content), 4, 4, seed=0)).starts is None


def test_validation_of_documents_scores_all_but_the_separators():
    content = b"aaa\nbb\ncccccc\ndddd"
    windows = validation_windows(Text(np.frombuffer(content, np.uint8), np.asarray([3, 6, 13])), 5, documents=True)
    assert windows.targets[windows.scored].tobytes() == content.replace(b"\n", b"")
    assert windows.num_bytes == len(content) - 3
    np.testing.assert_array_equal(windows.starts[1:], windows.inputs[1:] == ord("\n"))
    assert not windows.starts[0, 0], "what stands before the text begins no other document"


def test_a_part_of_a_text_keeps_its_documents():
    part = Text(np.arange(20, dtype=np.uint8), np.asarray([3, 6, 13]))[6:14]
    assert part.tokens.tolist() == list(range(6, 14))
    assert part.starts.tolist() == [0, 7]
    assert part.begins(1, 7).tolist() == [False] * 6 + [True]
