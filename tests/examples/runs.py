"""Small runs of the trainer for its tests."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from examples.train.config import Config
from examples.train.generate import load
from examples.train.presets import TOY

ROOT = Path(__file__).parents[2]
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "rats", "ate", "oats", "at", "tea")


def write_text(folder: Path, size: int = 20_000) -> Path:
    """A text of few words, easy to learn."""
    drawn = np.random.default_rng(0).choice(WORDS, size // 2)
    path = folder / "text.txt"
    path.write_text(" ".join(drawn)[:size])
    return path


def toy_config(folder: Path, **changes) -> Config:
    """The toy preset on `write_text`, in folder/run."""
    text = folder / "text.txt"
    changes = {"data": str(text), "run": folder / "run", "steps": 20, **changes}
    return dataclasses.replace(TOY, **changes)


def state_of(folder: Path):
    """Everything that the newest checkpoint of a run holds of the training state."""
    return load(folder)[1]


def assert_same_bits(actual, expected):
    """Fails unless the two trees have the same leaves, bit for bit."""
    actual, expected = (jax.tree_util.tree_leaves_with_path(tree) for tree in (actual, expected))
    assert [path for path, _ in actual] == [path for path, _ in expected]
    for (path, leaf), (_, other) in zip(actual, expected, strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes(), jax.tree_util.keystr(path)


def cpu_alone() -> dict[str, str]:
    """The environment of a process that computes on the CPU."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def start(*arguments: object) -> subprocess.Popen:
    """The trainer's command line in a process of its own, on the CPU."""
    command = [sys.executable, "-m", "examples.train", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=cpu_alone(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(process, words):
    """Reads the process's output up to a line with these words."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return
    pytest.fail(f"no line with {words!r} in:\n{''.join(lines)}")
