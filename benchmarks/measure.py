"""Timing and recording: a row a measurement, as JSON lines in benchmarks/results/."""

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
import statistics
import time
import uuid
from collections.abc import Callable

import jax

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        suite: "kernel", "layer", "decode" or "step".
        shape: name of the problem, such as "super_up_t8192".
        pass_: "forward", "dgrad", "wgrad" or "forward_backward" ("pass" in the file).
        impl: what ran.
        ms: median time of one call, in milliseconds.
        tflops: 1e12 floating-point operations a second, by the operations the maths needs.
        floor_ms: the time that this device's measured matmul rate and bandwidth allow at best.
        max_error: ||out - ref|| / ||ref|| against a float32 or float64 reference; None where another row shows it.
        temp_bytes: temporary memory, as XLA plans it.
    """

    suite: str
    shape: str
    pass_: str
    impl: str
    ms: float
    tflops: float
    floor_ms: float
    max_error: float | None
    temp_bytes: int


def time_interleaved(calls: dict[str, tuple[Callable, tuple]], repeats: int) -> dict[str, tuple[float, int]]:
    """Median milliseconds and temporary bytes of jitted calls, taken in turn so that a drift hits all alike."""
    compiled = {name: (jax.jit(f).lower(*args).compile(), args) for name, (f, args) in calls.items()}
    times = {name: [] for name in compiled}
    for _ in range(repeats):
        for name, (call, args) in compiled.items():
            # Each timed call follows one of its own kind, or it would pay for the memory that its neighbour took.
            jax.block_until_ready(call(*args))
            start = time.perf_counter()
            jax.block_until_ready(call(*args))
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: (statistics.median(times[name]), _temp_bytes(call)) for name, (call, _) in compiled.items()}


def _temp_bytes(compiled) -> int:
    analysis = compiled.memory_analysis()
    assert analysis is not None, "XLA plans memory on CPUs and GPUs"
    return analysis.temp_size_in_bytes


def record(rows: list[Row], device: str) -> pathlib.Path:
    """Appends the rows of one run to results/<device>-<date>.jsonl and returns that file."""
    path = RESULTS / f"{device}-{datetime.date.today()}.jsonl"
    path.parent.mkdir(exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")} | {
        "python": platform.python_version()
    }
    run = uuid.uuid4().hex[:12]
    with path.open("a") as file:
        for row in rows:
            fields = {key.rstrip("_"): value for key, value in dataclasses.asdict(row).items()}
            file.write(json.dumps(fields | {"run": run, "device": device, "versions": versions}) + "\n")
    return path
