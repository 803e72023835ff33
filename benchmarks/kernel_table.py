"""The kernels in a trace of a GPU, by time: `python -m benchmarks.kernel_table FOLDER [--steps N]`.

FOLDER holds a trace of `jax.profiler`, such as the folder `profile` that the trainer's --profile writes into the run's.
A second table has the times between kernels, when the GPU was idle.
`python -m benchmarks.gpu train --kernels` prints the table of each step that it times.
"""

import argparse
import collections
import dataclasses
import itertools
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from jax.profiler import ProfileData

from jax_latent_moe.grouped_matmul.tuning.timing import Call
from jax_latent_moe.piped import piped

MOST = 40


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All launches of the kernels with one name, on one device.

    Attributes:
        name: the name with # for each number, so that kernels of the layers of a model share it.
        launches: launches, a step.
        us: microseconds, a step.
    """

    name: str
    launches: float
    us: float


def read_trace(folder: pathlib.Path) -> Any:
    """The newest trace in a folder or below, as a `jax.profiler.ProfileData`.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder} holds no trace (*.xplane.pb): name a folder that jax.profiler wrote.")
    return ProfileData.from_file(str(found[-1]))


@dataclasses.dataclass(frozen=True)
class Wait:
    """All times between two kernels, when a GPU ran none.

    Attributes:
        before: the name of the kernel that ended last, with # for each number.
        after: the name of the next kernel.
        count: how often it happened, a step.
        us: microseconds, a step.
    """

    before: str
    after: str
    count: float
    us: float


def kernels(data: Any, steps: int = 1) -> list[Kernel]:
    """The kernels of a `ProfileData` of so many steps, those with the most time first. Several GPUs give their mean.

    Raises:
        ValueError: the trace has no GPU.
    """
    found = events_of_gpus(data)
    time, launches = collections.Counter(), collections.Counter()
    for event in itertools.chain(*found):
        time[name_of(event)] += event.duration_ns
        launches[name_of(event)] += 1
    share = steps * len(found)
    return [Kernel(name, launches[name] / share, ns / share / 1e3) for name, ns in time.most_common()]


def waits(data: Any, steps: int = 1) -> list[Wait]:
    """The times between the kernels of a `ProfileData` of so many steps, the longest first, in the same way.

    Raises:
        ValueError: the trace has no GPU.
    """
    found = events_of_gpus(data)
    time, count = collections.Counter(), collections.Counter()
    for events in found:
        last = None
        for event in sorted(events, key=lambda event: event.start_ns):
            if last is not None and event.start_ns > last.end_ns:
                time[name_of(last), name_of(event)] += event.start_ns - last.end_ns
                count[name_of(last), name_of(event)] += 1
            last = event if last is None or event.end_ns > last.end_ns else last
    share = steps * len(found)
    return [
        Wait(before, after, count[before, after] / share, ns / share / 1e3)
        for (before, after), ns in time.most_common()
    ]


def events_of_gpus(data) -> list[list]:
    """The events on the streams of each GPU.

    Raises:
        ValueError: the trace has no GPU.
    """
    planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
    if not planes:
        raise ValueError("the trace holds no GPU: record it where JAX computes on one.")
    return [[event for line in plane.lines if "Stream" in line.name for event in line.events] for plane in planes]


def name_of(event) -> str:
    return re.sub(r"\d+", "#", event.name)


def trace_of(run: Callable[[], object]) -> Any:
    """The trace of a call, which waits for its results, as a `jax.profiler.ProfileData`."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        return read_trace(pathlib.Path(folder))


def trace_of_calls(call: Call, count: int) -> Any:
    """The trace of so many calls, each queued behind the one before. A single one would run at other clocks."""

    def run():
        out = None
        for _ in range(count):
            out = call.run()
        call.wait(out)

    return trace_of(run)


def kernels_of(run: Callable[[], object], steps: int = 1) -> list[Kernel]:
    """The kernels of a call of so many steps, which waits for its results. Their times come from a profile of it.

    Raises:
        ValueError: JAX computes without a GPU.
    """
    return kernels(trace_of(run), steps)


def table(found: list[Kernel], most: int = MOST) -> str:
    """One line a kernel, and one for all of them. Kernels beyond the first `most` are one line too."""
    shown, rest = found[:most], found[most:]
    whole = _sum("all kernels", found)
    lines = [whole, *shown, *([_sum(f"{len(rest)} others", rest)] if rest else [])]
    return "\n".join(
        f"{one.us:10.1f} us {100 * one.us / (whole.us or 1):5.1f} % {one.launches:7.1f} x  {one.name[:100]}"
        for one in lines
    )


def table_of_waits(found: list[Wait], most: int = 10) -> str:
    """One line for all times between kernels, and one for each of the longest `most`."""
    whole = Wait("", "", sum(one.count for one in found), sum(one.us for one in found))
    lines = [f"{one.us:10.1f} us {one.count:15.1f} x  " for one in (whole, *found[:most])]
    ends = ["between kernels", *(f"{one.before[:50]} ... {one.after[:50]}" for one in found[:most])]
    return "\n".join(line + end for line, end in zip(lines, ends, strict=True))


def _sum(name, found) -> Kernel:
    return Kernel(name, sum(one.launches for one in found), sum(one.us for one in found))


def main() -> None:
    """Prints the table of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="holds the trace")
    parser.add_argument("--steps", type=int, default=1, help="steps in the trace; times are divided by it")
    parser.add_argument("--most", type=int, default=MOST, help="kernels to print")
    options = parser.parse_args()
    if options.steps < 1 or options.most < 1:
        parser.error(f"--steps {options.steps} and --most {options.most} must be at least 1.")
    try:
        data = read_trace(options.folder)
        print(table(kernels(data, options.steps), options.most))
        print(table_of_waits(waits(data, options.steps)))
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    with piped():
        main()
