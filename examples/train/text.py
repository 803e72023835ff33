"""Text as tokens, in memory or mapped from a file, with the places where its documents begin."""

import dataclasses
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped

from examples.train.documents import Pieces
from examples.train.errors import TrainError

SEPARATOR = ord("\n")
"""The byte that begins each document but the first, and stands before the first byte of a text."""

Parts = Iterator[tuple[Shaped[np.ndarray, " n"], bool]]
"""Tokens in order, each part with whether its first one begins a document."""


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """Tokens of documents, one after the other; without a tokenizer a token is a byte.

    Attributes:
        tokens: [n], unsigned integers.
        starts: [documents - 1], where each document but the first begins: the separator before it.
    """

    tokens: Shaped[np.ndarray, " n"]
    starts: Int[np.ndarray, " documents"] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @staticmethod
    def of(content: bytes) -> "Text":
        """One document."""
        return Text(np.frombuffer(content, np.uint8))

    def __getitem__(self, part: slice) -> "Text":
        """A contiguous part of the text."""
        start, stop, _ = part.indices(len(self.tokens))
        first, last = np.searchsorted(self.starts, [start, stop])
        return Text(self.tokens[start:stop], self.starts[first:last] - start)

    def begins(self, start: int, length: int) -> np.ndarray:
        """[length] bool: which of the tokens from `start` on begin a document."""
        found = np.zeros(length, bool)
        first, last = np.searchsorted(self.starts, [start, start + length])
        found[self.starts[first:last] - start] = True
        return found


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text to learn from and text to be judged by."""

    train: Text
    validation: Text


def with_separators(pieces: Pieces) -> Parts:
    """The documents as bytes, a newline before each but the first; empty ones are left out."""
    any_yet, begins = False, False
    for begins_here, piece in pieces:
        begins |= begins_here
        if not piece:
            continue
        separated = begins and any_yet
        yield np.frombuffer(b"\n" + piece if separated else piece, np.uint8), separated
        any_yet, begins = True, False


def in_memory(pieces: Pieces) -> Text:
    """The documents as bytes, in memory."""
    return collected(with_separators(pieces), np.uint8)


def collected(parts: Parts, dtype: type) -> Text:
    """The parts put together in memory."""
    tokens, starts, length = [np.zeros(0, dtype)], [], 0
    for part, begins in parts:
        if begins:
            starts.append(length)
        tokens.append(part)
        length += len(part)
    return Text(np.concatenate(tokens), np.asarray(starts, np.int64))


def on_disk(folder: Path, dtype: type, make: Callable[[], Parts]) -> Text:
    """The parts put together in a folder, from which they are mapped; made if the folder is not there.

    Args:
        folder: for the two files; it appears once it is complete.
        dtype: of the tokens.
        make: gives the parts.

    Raises:
        TrainError: it cannot be written.
    """
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.part")  # a name of its own
        try:
            partial.mkdir(parents=True)
            length = 0
            with (partial / "tokens").open("wb") as tokens, (partial / "starts").open("wb") as starts:
                for part, begins in make():
                    if begins:
                        starts.write(np.int64(length).tobytes())
                    tokens.write(part.astype(dtype, copy=False).tobytes())
                    length += len(part)
            _appear(partial, folder)
        except OSError as error:
            raise TrainError(f"The text cannot be kept in {folder.parent} ({error}): free some space there.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Text(_mapped(folder / "tokens", dtype), _mapped(folder / "starts", np.int64))


def _appear(partial: Path, folder: Path):
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():  # else another process made the same
            raise


def _mapped(path: Path, dtype: type) -> np.ndarray:
    if not path.stat().st_size:
        return np.zeros(0, dtype)  # nothing can be mapped
    return np.memmap(path, dtype, "r")
