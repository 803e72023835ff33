"""Small runs of the trainer for its tests."""

import contextlib
import dataclasses
import os
import socket
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
    """The environment of a process that computes on the CPU, with programs that are quick to compile."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONUNBUFFERED": "1"}


def start(*arguments: object, devices: int = 1) -> subprocess.Popen:
    """The trainer's command line in a process of its own, on virtual devices of the CPU."""
    command = [sys.executable, "-m", "examples.train", *map(str, arguments)]
    environment = cpu_alone() | {"JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def options(config: Config) -> list[object]:
    """The toy preset's command line for what `toy_config` changes."""
    names = ("preset", "data", "run", "steps", "mesh", "log_every", "checkpoint_every", "sample_bytes")
    return [part for name in names for part in ("--" + name.replace("_", "-"), getattr(config, name))]


@contextlib.contextmanager
def together(config: Config, processes: int):
    """The trainer in that many processes, each with one device; none of them outlives the test."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = [*options(config), "--coordinator", address, "--processes", processes]
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(start(*joined, "--process", i)) for i in range(processes)]
        try:
            yield started
        finally:
            for process in started:
                process.kill()


def wait_for(process, words):
    """Reads the process's output up to a line with these words."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return
    pytest.fail(f"no line with {words!r} in:\n{''.join(lines)}")
