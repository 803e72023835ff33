"""Batches for training and windows for validation."""

import itertools

import numpy as np
import pytest

from examples.train.data import train_batches, validation_windows
from examples.train.text import SEPARATOR, Text

TEXT = bytes(np.random.default_rng(0).integers(0, 256, 1003, np.uint8))
TOKENS = Text.of(TEXT)


def test_an_epoch_shows_each_window_once():
    context, size = 10, 20
    batches = itertools.islice(train_batches(TOKENS, context, size, seed=0), 5)
    seen = sorted(bytes(window) for batch in batches for window in batch.tokens)
    assert seen == sorted(TEXT[start : start + context + 1] for start in range(0, 1000, context))


def test_epochs_and_seeds_differ():
    first, second, other = (
        [bytes(batch.tokens) for batch in itertools.islice(train_batches(TOKENS, 10, 20, seed), start, start + 5)]
        for seed, start in ((0, 0), (0, 5), (1, 0))
    )
    assert first != second
    assert first != other


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_state_continues_the_sequence(steps):
    batches = train_batches(TOKENS, 10, 20, seed=3)
    for _ in range(steps):
        next(batches)
    state = batches.get_state()
    expected = [next(batches) for _ in range(9)]
    resumed = train_batches(TOKENS, 10, 20, seed=3)
    resumed.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(resumed).tokens, batch.tokens)


@pytest.mark.parametrize("length", [1, 5, 8, 9, 12, 13, 100, 101, 1003])
@pytest.mark.parametrize("context", [1, 7, 8])
def test_validation_scores_each_byte_once_after_the_byte_before_it(length, context):
    text = TEXT[:length]
    windows = validation_windows(Text.of(text), context)
    assert windows.inputs.shape == windows.targets.shape == windows.scored.shape
    assert windows.targets[windows.scored].tobytes() == text
    assert windows.inputs[windows.scored].tobytes() == (bytes([SEPARATOR]) + text)[:-1]


def test_validation_gives_each_byte_half_a_context():
    windows = validation_windows(TOKENS, 8)
    behind = np.broadcast_to(np.arange(8), windows.scored.shape)[1:][windows.scored[1:]]
    assert behind.min() == 4
