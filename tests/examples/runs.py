"""Small runs of the trainer for its tests."""

import atexit
import contextlib
import dataclasses
import functools
import itertools
import os
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from examples.train import train as training
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
    """The toy preset on `write_text`, in folder/run.

    The number of steps is part of the compiled programs, so runs with the same number compile once for a process.
    """
    text = folder / "text.txt"
    changes = {"data": str(text), "run": folder / "run", **changes}
    return dataclasses.replace(TOY, **changes)


def state_of(folder: Path):
    """Everything that the newest checkpoint of a run holds of the training state."""
    return load(folder)[1]


def tags_in(board: Path) -> set[str]:
    """The tags in a folder of TensorBoard files: records of a length, a checksum, an event and a checksum."""
    found = set()
    for path in board.iterdir():
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            found |= {value.tag for value in event.summary.value}
            at += length + 16
    return found


def assert_same_bits(actual, expected):
    """Fails unless the two trees have the same leaves, bit for bit."""
    actual, expected = (jax.tree_util.tree_leaves_with_path(tree) for tree in (actual, expected))
    assert [path for path, _ in actual] == [path for path, _ in expected]
    for (path, leaf), (_, other) in zip(actual, expected, strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes(), jax.tree_util.keystr(path)


def cpu_alone() -> dict[str, str]:
    """The environment of a process that computes on the CPU, with programs that are quick to compile."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def stopped_after(steps: int):
    """Within it, a run in this process stops after so many steps of its own, as if a signal had come."""
    asked = itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "any_process", lambda here: here or next(asked) >= steps)
        yield


@functools.cache
def compilation_cache() -> dict[str, str]:
    """The environment in which processes share their compiled programs. The folder lives as long as this process."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return {"JAX_COMPILATION_CACHE_DIR": folder.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def start(*arguments: object, devices: int = 1, cached: bool = True, before: str = "") -> subprocess.Popen:
    """The trainer's command line in a separate process, on virtual devices of the CPU.

    Args:
        arguments: the command line.
        devices: the number of devices.
        cached: whether it may use programs that another process has compiled.
        before: Python to run before the trainer.
    """
    program = f"{before}\nfrom examples.train.train import main\nmain()"
    how = ("-c", program) if before else ("-m", "examples.train")
    command = [sys.executable, *how, *map(str, arguments)]
    environment = cpu_alone() | {"JAX_NUM_CPU_DEVICES": str(devices)} | (compilation_cache() if cached else {})
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def options(config: Config) -> list[object]:
    """The toy preset's command line for what `toy_config` changes."""
    names = ("preset", "data", "run", "steps", "mesh", "log_every", "checkpoint_every", "sample_bytes")
    return [part for name in names for part in ("--" + name.replace("_", "-"), getattr(config, name))]


@contextlib.contextmanager
def together(config: Config, processes: int, **how):
    """The trainer in that many processes, each with one device. All of them end with the test.

    Args:
        config: the options of the run.
        processes: the number of processes.
        how: see `start`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = [*options(config), "--coordinator", address, "--processes", processes]
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(start(*joined, "--process", i, **how)) for i in range(processes)]
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
