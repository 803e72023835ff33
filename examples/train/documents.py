"""Reads the documents of files piece by piece: plain text, JSON lines and Parquet."""

import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.train.errors import TrainError

PIECE = 2**20
"""Number of bytes that are read from a text file at once."""

Pieces = Iterator[tuple[bool, bytes]]
"""Pieces of documents in order. The flag of a piece says whether it begins a document."""


def read_documents(files: list[Path], column: str) -> Pieces:
    """The documents of files. A text file, a JSON line and a row of a Parquet file are one document each.

    A text file with a NUL byte is binary and is left out.

    Args:
        files: in the order to read. The endings .jsonl, .jsonl.gz, .jsonl.zst and .parquet mark rows. Other files are
            plain text.
        column: the field or column that holds the text.

    Raises:
        TrainError: a file cannot be read, is damaged, or lacks the column.
    """
    for file in files:
        try:
            yield from _reader(file)(file, column)
        except OSError as error:
            raise TrainError(f"{file} cannot be read ({error}): make it readable or leave it out of --data.") from error


def is_text(file: Path) -> bool:
    """Whether a file is read as plain text."""
    return _reader(file) is _text


def _reader(file: Path):
    if file.suffix == ".parquet":
        return _parquet
    return _json_lines if file.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")) else _text


def _text(file: Path, column: str) -> Pieces:
    del column
    with file.open("rb") as stream:
        if any(b"\0" in piece for piece in iter(lambda: stream.read(PIECE), b"")):
            return
        stream.seek(0)
        yield True, stream.read(PIECE)
        for piece in iter(lambda: stream.read(PIECE), b""):
            yield False, piece


def _json_lines(file: Path, column: str) -> Pieces:
    with _opened(file) as stream:
        try:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield True, _field(line, f"{file}, line {number}", column)
        except (EOFError, OSError, zlib.error) as error:  # the decompressors of Python and pyarrow raise these
            raise TrainError(f"{file} is damaged ({error}): restore it or leave it out of --data.") from error


def _field(line: bytes, where: str, column: str) -> bytes:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TrainError(f"{where} is not JSON ({error}): repair it or leave the file out of --data.") from error
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        names = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise TrainError(
            f"{where} has no text in the field {column!r}. It holds {names or 'nothing'}: name the field with "
            "--data-column."
        )
    return row[column].encode(errors="surrogatepass")


def _parquet(file: Path, column: str) -> Pieces:
    pyarrow, parquet = _imported("pyarrow", file), _imported("pyarrow.parquet", file)
    try:
        table = parquet.ParquetFile(file)
        kinds = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_binary)
        fields = [field.name for field in table.schema_arrow if any(kind(field.type) for kind in kinds)]
        if column not in fields:
            raise TrainError(
                f"{file} has no text in the column {column!r}. Columns with text: {', '.join(fields) or 'none'}. Name "
                "one with --data-column."
            )
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0):
                text = value.as_py()
                if text is not None:
                    yield True, text.encode() if isinstance(text, str) else text
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise TrainError(
            f"{file} is not a readable Parquet file ({first}): restore it or leave it out of --data."
        ) from error


def _opened(file: Path) -> Any:
    if file.suffix == ".gz":
        return gzip.open(file)
    if file.suffix == ".zst":
        return io.BufferedReader(_imported("pyarrow", file).input_stream(str(file), compression="zstd"))
    return file.open("rb")


def _imported(name: str, file: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrainError(f"{file} needs the package pyarrow: pip install 'jax-latent-moe[data]'.") from error
