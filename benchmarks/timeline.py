"""When each kernel of a step starts and ends, from a trace of many equal steps.

Kernels that are launched early overlap, so their times do not add up to the time of a step.
"""

import collections
import dataclasses
import itertools
import statistics
from typing import Any

from benchmarks.kernel_table import events_of_gpus, name_of


@dataclasses.dataclass(frozen=True)
class Span:
    """One launch of a step.

    Attributes:
        name: the kernel's name with # for each number.
        start_us: the median time from the start of the step's first kernel, in microseconds.
        end_us: the same for its end.
    """

    name: str
    start_us: float
    end_us: float


def timeline(data: Any, steps: int) -> list[Span]:
    """The launches of a step on the first GPU of a `ProfileData`, in the order of their starts.

    Kernels with fewer launches than steps are left out, and so are steps whose kernels started in another order.

    Raises:
        ValueError: the trace has no GPU.
    """
    events = sorted(events_of_gpus(data)[0], key=lambda event: event.start_ns)
    launches = collections.Counter(event.name for event in events)
    repeated = [event for event in events if launches[event.name] >= steps]
    if not repeated:
        return []
    each = list(itertools.batched(repeated, max(1, len(repeated) // steps)))
    orders = collections.Counter(tuple(event.name for event in step) for step in each)
    usual = orders.most_common(1)[0][0]
    chosen = [step for step in each if tuple(event.name for event in step) == usual]

    def median_us(i, time):
        return statistics.median(time(step[i]) - step[0].start_ns for step in chosen) / 1e3

    return [
        Span(
            name_of(chosen[0][i]),
            median_us(i, lambda event: event.start_ns),
            median_us(i, lambda event: event.start_ns + event.duration_ns),
        )
        for i in range(len(usual))
    ]


def table(found: list[Span]) -> str:
    """One line a launch."""
    return "\n".join(f"{one.start_us:10.1f} to {one.end_us:6.1f} us  {one.name[:100]}" for one in found)
