"""Text as an array of tokens, in memory or mapped from a file, with the places where documents begin."""

import dataclasses
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped

from examples.train.documents import Pieces
from examples.train.errors import TrainError

SEPARATOR = ord("\n")
"""The byte at the start of each document but the first. It also precedes the first byte of a text."""

Parts = Iterator[tuple[Shaped[np.ndarray, " n"], bool]]
"""Parts of a text in order. The flag of a part says whether its first token begins a document."""


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """The tokens of all documents, one after the other. Without a tokenizer a token is a byte.

    Attributes:
        tokens: [n], unsigned integers.
        starts: [documents - 1], the places of the separators that begin each document but the first.
    """

    tokens: Shaped[np.ndarray, " n"]
    starts: Int[np.ndarray, " documents"] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @staticmethod
    def of(content: bytes) -> "Text":
        """A text of one document."""
        return Text(np.frombuffer(content, np.uint8))

    def __getitem__(self, part: slice) -> "Text":
        """A contiguous part of the text."""
        start, stop, _ = part.indices(len(self.tokens))
        first, last = np.searchsorted(self.starts, [start, stop])
        return Text(self.tokens[start:stop], self.starts[first:last] - start)

    def begins(self, start: int, length: int) -> np.ndarray:
        """[length] bool. True for each token from `start` on that begins a document."""
        found = np.zeros(length, bool)
        first, last = np.searchsorted(self.starts, [start, start + length])
        found[self.starts[first:last] - start] = True
        return found


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The text to train on and the texts to validate on.

    Attributes:
        train: the training text.
        validation: the held-out text.
        more: other texts to validate on, by name.
    """

    train: Text
    validation: Text
    more: Mapping[str, Text] = dataclasses.field(default_factory=dict)

    @property
    def validations(self) -> dict[str, Text]:
        """All texts to validate on, by name. The held-out text has the empty name."""
        return {"": self.validation, **self.more}


def with_separators(pieces: Pieces) -> Parts:
    """The documents as bytes, with a newline before each but the first. Empty documents are left out."""
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
    """The parts joined in memory."""
    tokens, starts, length = [np.zeros(0, dtype)], [], 0
    for part, begins in parts:
        if begins:
            starts.append(length)
        tokens.append(part)
        length += len(part)
    return Text(np.concatenate(tokens), np.asarray(starts, np.int64))


def on_disk(folder: Path, dtype: type, make: Callable[[], Parts]) -> Text:
    """The parts joined in two files, from which they are mapped. If the folder exists, its files are used.

    Args:
        folder: the folder of the two files. It appears when both are complete.
        dtype: the dtype of the tokens.
        make: gives the parts.

    Raises:
        TrainError: the files cannot be written.
    """
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.part")  # no other process has this name
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
            raise TrainError(f"The text cannot be cached in {folder.parent} ({error}): free space there.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Text(_mapped(folder / "tokens", dtype), _mapped(folder / "starts", np.int64))


def _appear(partial: Path, folder: Path):
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():  # if it exists, another process has made the same files
            raise


def _mapped(path: Path, dtype: type) -> np.ndarray:
    if not path.stat().st_size:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, "r")
