"""When the kernels of a step start and end, from a trace written by hand."""

import pytest
from jax.profiler import ProfileData

from benchmarks.timeline import Span, table, timeline


def trace(events: list[tuple[str, int, int]], plane="/device:GPU:0") -> ProfileData:
    """A trace of events with a name, a start and a duration in microseconds."""
    names = sorted({name for name, _, _ in events})
    known = " ".join(
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for i, name in enumerate(names, 1)
    )
    listed = " ".join(
        f"events {{ metadata_id: {names.index(name) + 1} offset_ps: {start * 10**6} duration_ps: {us * 10**6} }}"
        for name, start, us in events
    )
    return ProfileData.from_text_proto(f'planes {{ name: "{plane}" {known} lines {{ name: "Stream #1" {listed} }} }}')


def test_medians_of_steps_whose_kernels_overlap():
    """A kernel of the first step alone is left out. So is a step whose kernels started in another order."""
    events = [("copy", 0, 1)]
    for step, late in enumerate((0, 0, 2, 4)):
        begin = 100 * (step + 1)
        events += [("matmul_1", begin, 10), ("choice_2", begin + 1, 14 + late), ("matmul_1", begin + 20 + late, 5)]
    events += [("choice_2", 500, 3), ("matmul_1", 501, 3), ("matmul_1", 510, 3)]
    found = timeline(trace(events), steps=5)
    assert found == [Span("matmul_#", 0, 10), Span("choice_#", 1, 16), Span("matmul_#", 21, 26)]
    assert table(found).splitlines()[1] == "       1.0 to   16.0 us  choice_#"


def test_no_kernel_of_each_step():
    assert timeline(trace([("copy", 0, 1)]), steps=2) == []


def test_no_gpu():
    with pytest.raises(ValueError, match="the trace holds no GPU"):
        timeline(trace([("copy", 0, 1)], plane="/host:CPU"), steps=1)
