"""Batches of a text: shuffled windows for training, overlapping windows for validation."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped

from examples.train.config import Config
from examples.train.errors import TrainError
from examples.train.text import SEPARATOR, Corpus, Text
from examples.train.tokenizer import Tokenizer

ROUNDS = 6
"""Rounds of the Feistel network that shuffles. After four the permutation looks random (Luby and Rackoff, 1988)."""
AHEAD = 2
"""Number of batches that wait on the device for their steps."""


class Batch(NamedTuple):
    """Windows of a text.

    Attributes:
        tokens: [batch, context + 1] for training, [batch, context] for validation.
        starts: of the same shape, True where a document begins. None without --documents.
    """

    tokens: Int[Any, "batch time"]
    starts: Bool[Any, "batch time"] | None = None


class Batches:
    """The endless batches of one process. A batch depends only on its number.

    A window is `context` tokens of the text and the token that follows them. Each epoch shows every window once, in a
    new order. In each step, several processes together read the windows that a single process would read.
    """

    def __init__(self, text: Text, context: int, batch_size: int, seed: int, process=0, processes=1, documents=False):
        self._text, self._context, self._seed, self._documents = text, context, seed, documents
        self._batch_size, self._process, self._processes = batch_size, process, processes
        self._windows = (len(text.tokens) - 1) // context
        self._next = 0

    def at(self, number: int) -> Batch:
        """The batch of a step. Steps count from 0."""
        drawn = np.arange(number * self._batch_size, (number + 1) * self._batch_size)[self._process :: self._processes]
        epochs, positions = np.divmod(drawn, self._windows)
        starts = np.empty_like(drawn)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            starts[of_epoch] = permuted(positions[of_epoch], self._windows, self._seed, int(epoch)) * self._context
        length, text = self._context + 1, self._text
        tokens = np.stack([text.tokens[start : start + length] for start in starts])
        begins = [text.begins(start, length) for start in starts] if self._documents else None
        return Batch(tokens, None if begins is None else np.stack(begins))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        self._next += 1
        return self.at(self._next - 1)

    def get_state(self) -> dict[str, Any]:
        """The state that `set_state` needs to continue from here, even with another number of processes."""
        return {"batches": self._next}

    def set_state(self, state: dict[str, Any]):
        """Continues after the batches that were read when `get_state` returned this state.

        Raises:
            TrainError: another kind of iterator wrote the state.
        """
        if set(state) != {"batches"}:
            raise TrainError(
                "The checkpoint was written by a version with another order of the data: start a new run in another "
                "folder with --run."
            )
        self._next = state["batches"]


def train_batches(
    text: Text, context: int, batch_size: int, seed: int, *, process=0, processes=1, documents=False
) -> Batches:
    """`Batches` of [batch_size / processes, context + 1] tokens."""
    return Batches(text, context, batch_size, seed, process, processes, documents)


class Ahead:
    """Places the next batches on the devices in a thread. Its state counts only the batches that were read."""

    def __init__(self, batches: Batches, place: Callable[[Batch], Batch]):
        self._batches, self._place = batches, place
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._coming, self._number = collections.deque(), batches.get_state()["batches"]

    def __next__(self) -> Batch:
        while len(self._coming) <= AHEAD:
            number = self._number + len(self._coming)
            self._coming.append(self._pool.submit(lambda number=number: self._place(self._batches.at(number))))
        self._number += 1
        return self._coming.popleft().result()

    def get_state(self) -> dict[str, Any]:
        """The same state as `Batches.get_state` returns."""
        return {"batches": self._number}

    def close(self):
        """Ends the thread."""
        self._pool.shutdown(cancel_futures=True)


def permuted(positions: Int[np.ndarray, " n"], size: int, *seed: int) -> Int[np.ndarray, " n"]:
    """The places of some positions in a random permutation of `size` elements, without the permutation in memory.

    A Feistel network permutes the numbers below the next power of four (Luby and Rackoff, 1988). It is applied again
    to every result that is not below `size`.
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)
    found = positions.astype(np.uint64)
    pending = np.ones(len(found), bool)
    while pending.any():
        left, right = found[pending] >> half, found[pending] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        found[pending] = (left << half) | right
        pending = found >= size
    return found.astype(np.int64)


def _mixed(x):
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class ValidationWindows:
    """Windows over a text that score each of its tokens once.

    Attributes:
        inputs: [n, context], the token before each target.
        targets: [n, context].
        scored: [n, context], True in the one window in which the token has the most context.
        starts: [n, context], True for the inputs that begin a document. None without --documents.
        token_bytes: [vocabulary], bytes of each token. None if each token is one byte.
    """

    inputs: Shaped[np.ndarray, "n context"]
    targets: Shaped[np.ndarray, "n context"]
    scored: Bool[np.ndarray, "n context"]
    starts: Bool[np.ndarray, "n context"] | None = None
    token_bytes: Int[np.ndarray, " vocabulary"] | None = None

    @property
    def arrays(self) -> tuple[Batch, np.ndarray, np.ndarray]:
        """The inputs of the model, the targets, and which targets are scored."""
        return Batch(self.inputs, self.starts), self.targets, self.scored

    @property
    def num_bytes(self) -> int:
        """The number of bytes in the scored tokens."""
        if self.token_bytes is None:
            return int(self.scored.sum())
        return int(self.token_bytes[self.targets[self.scored]].sum())

    def subset(self, count: int) -> "ValidationWindows":
        """At most `count` windows, evenly spread over the text."""
        chosen = np.unique(np.linspace(0, len(self.inputs) - 1, count).astype(int))
        starts = None if self.starts is None else self.starts[chosen]
        parts = self.inputs[chosen], self.targets[chosen], self.scored[chosen]
        return ValidationWindows(*parts, starts, self.token_bytes)


def validation_windows(
    text: Text, context: int, *, documents: bool = False, start: int = SEPARATOR, token_bytes: np.ndarray | None = None
) -> ValidationWindows:
    """Windows that overlap by half. Only the first tokens of a text have fewer than context / 2 tokens before them.

    Args:
        text: the held-out text.
        context: tokens of a window.
        documents: whether the model keeps documents apart. The tokens that begin a document are then not scored.
        start: the token before the first token of the text.
        token_bytes: see `ValidationWindows`.
    """
    length, stride = len(text.tokens), (context + 1) // 2
    count = max(0, -(-(length - context) // stride)) + 1
    positions = np.arange(count)[:, None] * stride + np.arange(context)
    scored = (positions < length) & ((np.arange(context) >= context - stride) | (np.arange(count)[:, None] == 0))
    with_start = np.concatenate([np.asarray([start], text.tokens.dtype), text.tokens])
    inside = np.minimum(positions, length - 1)
    starts = None
    if documents:
        begins = np.zeros(length + 1, bool)
        begins[text.starts + 1] = True
        starts, scored = begins[inside], scored & ~begins[inside + 1]
    return ValidationWindows(with_start[inside], with_start[inside + 1], scored, starts, token_bytes)


def held_out_windows(config: Config, tokenizer: Tokenizer, text: Text) -> ValidationWindows:
    """The `validation_windows` that fit the options and the tokenizer of a run."""
    return validation_windows(
        text,
        config.model.context,
        documents=config.documents,
        start=tokenizer.separator,
        token_bytes=tokenizer.token_bytes,
    )


def check_length(corpus: Corpus, context: int, unit: str = "bytes"):
    """Refuses a corpus that has less than one training window or no validation token.

    Raises:
        TrainError: the text is too short.
    """
    train, validation = len(corpus.train.tokens), len(corpus.validation.tokens)
    if train <= context or not validation:
        raise TrainError(
            f"The text has {train} {unit} to train on and {validation} to validate on, but model.context={context} "
            f"needs at least {context + 1} and 1: give more text or a smaller --model.context."
        )
