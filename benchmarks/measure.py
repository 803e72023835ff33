"""Timing and recording: one row per measurement, as JSON lines in benchmarks/results/."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import pathlib
import platform
import statistics
import time
import uuid
from collections.abc import Callable

import jax

RESULTS = pathlib.Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "torch", "triton", "transformers", "tokamax", "sonic-moe", "quack-kernels")
WRONG = 1e9
"""The value of `Row.max_error` for a result that holds NaN or infinity."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        suite: "compile", "kernel", "fp8", "fp8_layer", "widen", "prefill", "lora", "layer", "ragged_dot", "decode",
            "logits", "loop", "step", "survey", "train", "parallel" or "loading".
        shape: name of the problem, such as "super_up_t8192".
        pass_: "forward", "dgrad", "wgrad" or "forward_backward" ("pass" in the file). benchmarks/train.py,
            benchmarks/fp8.py, benchmarks/fp8_layers.py, benchmarks/loop.py and benchmarks/loading.py have their own.
        impl: name of the implementation.
        ms: median time of one call, or of one compilation, in milliseconds. In the suite "survey" it is the device's
            time of a call, without the host's to dispatch it.
        tflops: 1e12 floating-point operations per second, counting the operations that the maths needs.
        floor_ms: the least time at this device's measured matmul rate and bandwidth.
        max_error: ||out - ref|| / ||ref|| against a float32 or float64 reference; None if another row has it.
        temp_bytes: temporary memory besides arguments and results, from XLA's plan or torch's allocator; None if it is
            not known. In the suite "loading" it is a peak of memory, or the bytes of the files.
    """

    suite: str
    shape: str
    pass_: str
    impl: str
    ms: float
    tflops: float
    floor_ms: float
    max_error: float | None
    temp_bytes: int | None


def device_name() -> str:
    """The first device's kind as files of results name it, such as "h200"."""
    return jax.devices()[0].device_kind.lower().removeprefix("nvidia ").replace(" ", "-")


def time_interleaved(calls: dict[str, tuple[Callable, tuple]], repeats: int) -> dict[str, tuple[float, int]]:
    """Median milliseconds and temporary bytes of jitted calls. They take turns, so that a drift affects all equally."""
    compiled = {name: (jax.jit(f).lower(*args).compile(), args) for name, (f, args) in calls.items()}
    times = {name: [] for name in compiled}
    for _ in range(repeats):
        for name, (call, args) in compiled.items():
            # A call of the same kind comes first. Otherwise the timed one would pay for memory that another call took.
            jax.block_until_ready(call(*args))
            start = time.perf_counter()
            jax.block_until_ready(call(*args))
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: (statistics.median(times[name]), _temp_bytes(call)) for name, (call, _) in compiled.items()}


def _temp_bytes(compiled) -> int:
    analysis = compiled.memory_analysis()
    assert analysis is not None, "XLA plans memory on CPUs and GPUs"
    return analysis.temp_size_in_bytes


class Run:
    """The rows of one run, with one id in results/<device>-<date>.jsonl. Each row is written once it is measured.

    Attributes:
        path: the file.
    """

    def __init__(self, device: str, folder: pathlib.Path = RESULTS):
        self.path = folder / f"{device}-{datetime.date.today()}.jsonl"
        self._common = {"run": uuid.uuid4().hex[:12], "device": device, "versions": _versions()}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        """Appends a row."""
        fields = {key.rstrip("_"): value for key, value in dataclasses.asdict(row).items()}
        if row.max_error is not None and not math.isfinite(row.max_error):
            fields["max_error"] = WRONG
        with self.path.open("a") as file:
            file.write(json.dumps(fields | self._common) + "\n")


def record(rows: list[Row], device: str) -> pathlib.Path:
    """Appends the rows of one run to results/<device>-<date>.jsonl and returns that file."""
    run = Run(device)
    for row in rows:
        run.add(row)
    return run.path


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a peer that is not installed
    return found


def show(row: Row) -> None:
    """Prints a row as a line of a table."""
    error = "" if row.max_error is None else f"error {row.max_error:.1e}"
    temp = "" if row.temp_bytes is None else f"temp {row.temp_bytes / 2**20:.0f} MiB"
    print(
        f"{row.suite:>7} {row.shape:>22} {row.pass_:>16} {row.impl:>30} {row.ms:8.3f} ms {row.tflops:6.0f} TFLOP/s "
        f"floor {row.floor_ms:6.3f} ms {error} {temp}",
        flush=True,
    )


@dataclasses.dataclass(frozen=True)
class Session:
    """The settings of one run of the GPU benchmark.

    Attributes:
        run: records the rows.
        rate: the device's measured FLOP/s.
        bandwidth: the device's measured bytes/s.
        quick: whether to use fewer peers and no sweeps.
        rounds: number of batches, of which the median is taken.
        without: implementations to leave out.
        kernels: whether the suite "train" prints the kernels of each step.
        sweep: whether the suite "widen" times every tile.
    """

    run: Run
    rate: float
    bandwidth: float
    quick: bool = False
    rounds: int = 7
    without: frozenset[str] = frozenset()
    kernels: bool = False
    sweep: bool = False

    def floor_ms(self, flops: float, traffic: float) -> float:
        """The least milliseconds for this many operations and bytes."""
        return 1e3 * max(flops / self.rate, traffic / self.bandwidth)

    def wanted[T](self, candidates: dict[str, T]) -> dict[str, T]:
        """The candidates without those to leave out. A sweep's are named "<implementation>/<tile>"."""
        return {name: value for name, value in candidates.items() if name.split("/")[0] not in self.without}

    def record(self, row: Row) -> None:
        """Records and prints a row."""
        self.run.add(row)
        show(row)
