"""The kernels in a trace of a GPU, by time: `python -m benchmarks.kernel_table FOLDER [--steps N]`.

FOLDER holds a trace of `jax.profiler`, such as the folder `profile` that the trainer's --profile writes into the run's.
`python -m benchmarks.gpu train --kernels` prints the table of each step that it times.
"""

import argparse
import collections
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from jax.profiler import ProfileData

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


def kernels(data: Any, steps: int = 1) -> list[Kernel]:
    """The kernels of a `ProfileData` of so many steps, those with the most time first. Several GPUs give their mean.

    Raises:
        ValueError: the trace has no GPU.
    """
    planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
    if not planes:
        raise ValueError("the trace holds no GPU: record it where JAX computes on one.")
    time, launches = collections.Counter(), collections.Counter()
    for event in (event for plane in planes for line in plane.lines if "Stream" in line.name for event in line.events):
        name = re.sub(r"\d+", "#", event.name)
        time[name] += event.duration_ns
        launches[name] += 1
    share = steps * len(planes)
    return [Kernel(name, launches[name] / share, ns / share / 1e3) for name, ns in time.most_common()]


def kernels_of(run: Callable[[], object], steps: int = 1) -> list[Kernel]:
    """The kernels of a call of so many steps, which waits for its results. Their times come from a profile of it.

    Raises:
        ValueError: JAX computes without a GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        return kernels(read_trace(pathlib.Path(folder)), steps)


def table(found: list[Kernel], most: int = MOST) -> str:
    """One line a kernel, and one for all of them. Kernels beyond the first `most` are one line too."""
    shown, rest = found[:most], found[most:]
    whole = _sum("all kernels", found)
    lines = [whole, *shown, *([_sum(f"{len(rest)} others", rest)] if rest else [])]
    return "\n".join(
        f"{one.us:10.1f} us {100 * one.us / (whole.us or 1):5.1f} % {one.launches:7.1f} x  {one.name[:100]}"
        for one in lines
    )


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
        print(table(kernels(read_trace(options.folder), options.steps), options.most))
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    with piped():
        main()
