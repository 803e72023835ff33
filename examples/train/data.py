"""Bytes to batches: a deterministic grain pipeline for training, overlapping windows for validation."""

import dataclasses

import grain
import numpy as np
from jaxtyping import Bool, Int32, UInt8

from examples.train.corpus import Corpus
from examples.train.errors import TrainError

START = ord("\n")
"""The byte that stands before the first byte of a text."""


class Windows(grain.sources.RandomAccessDataSource):
    """Every run of `context` bytes of a text, side by side, each with the byte that follows it."""

    def __init__(self, text: bytes, context: int):
        self._text = np.frombuffer(text, np.uint8)
        self._context = context

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._context

    def __getitem__(self, index: int) -> UInt8[np.ndarray, " context+1"]:
        start = index * self._context
        return self._text[start : start + self._context + 1]


def train_batches(
    text: bytes, context: int, batch_size: int, seed: int, *, process: int = 0, processes: int = 1
) -> grain.DatasetIterator:
    """Endless batches [batch_size / processes, context + 1] of one process, shuffled anew in each epoch.

    A step's batches of all processes hold the windows that one process alone would read in that step. The iterator's
    `get_state` and `set_state` continue the same sequence from any step, also with another number of processes.
    """
    windows = grain.MapDataset.source(Windows(text, context)).seed(seed).shuffle().repeat()
    batches = (
        windows[process::processes]
        .batch(batch_size // processes)
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
    )
    return iter(batches)


@dataclasses.dataclass(frozen=True)
class ValidationWindows:
    """Windows over a text that score each of its bytes once.

    Attributes:
        inputs: [n, context]; the byte before each target.
        targets: [n, context].
        scored: [n, context]; each byte counts in the window where it has the most context.
    """

    inputs: UInt8[np.ndarray, "n context"]
    targets: UInt8[np.ndarray, "n context"]
    scored: Bool[np.ndarray, "n context"]

    def subset(self, count: int) -> "ValidationWindows":
        """At most `count` of the windows, evenly spread."""
        chosen = np.unique(np.linspace(0, len(self.inputs) - 1, count).astype(int))
        return ValidationWindows(self.inputs[chosen], self.targets[chosen], self.scored[chosen])


def validation_windows(text: bytes, context: int) -> ValidationWindows:
    """Windows that overlap by half, so that all bytes but the first few have at least context / 2 bytes before them."""
    stride = (context + 1) // 2
    count = max(0, -(-(len(text) - context) // stride)) + 1
    positions: Int32[np.ndarray, "n context"] = np.arange(count)[:, None] * stride + np.arange(context)
    scored = (positions < len(text)) & ((np.arange(context) >= context - stride) | (np.arange(count)[:, None] == 0))
    with_start = np.frombuffer(bytes([START]) + text, np.uint8)
    inside = np.minimum(positions, len(text) - 1)
    return ValidationWindows(with_start[inside], with_start[inside + 1], scored)


def check_length(corpus: Corpus, context: int):
    """Refuses a corpus that does not fill one window of training and one byte of validation.

    Raises:
        TrainError: the text is too short.
    """
    if len(corpus.train) <= context or not corpus.validation:
        raise TrainError(
            f"The text has {len(corpus.train)} bytes to train on and {len(corpus.validation)} to validate, but "
            f"model.context={context} needs more than {context} and 0: give more text or a smaller --model.context."
        )
