"""The table of kernels, from traces written by hand."""

import sys

import pytest
from jax.profiler import ProfileData

from benchmarks import kernel_table
from benchmarks.kernel_table import Kernel, Wait, kernels, read_trace, table, table_of_waits, waits


def trace(planes: dict[str, dict[str, list[tuple[str, int]]]]) -> str:
    """The text of a trace: by plane and line, the names and microseconds of its events."""
    parts = []
    for plane, lines in planes.items():
        names = sorted({name for events in lines.values() for name, _ in events})
        parts.append(f'planes {{ name: "{plane}"')
        parts += [
            f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for i, name in enumerate(names, 1)
        ]
        for line, events in lines.items():
            listed = " ".join(
                f"events {{ metadata_id: {names.index(name) + 1} duration_ps: {us * 10**6} }}" for name, us in events
            )
            parts.append(f'lines {{ name: "{line}" {listed} }}')
        parts.append("}")
    return " ".join(parts)


ONE_GPU = {
    "/host:CPU": {"python": [("fusion_3", 1000)]},
    "/device:GPU:0": {
        "Stream #13(Compute)": [("fusion_1", 10), ("fusion_22", 20), ("matmul_128x64", 70)],
        "Stream #14(Memcpy)": [("memcpy", 4)],
        "XLA Ops": [("fusion_1", 10)],
    },
}


def test_kernels_are_counted_by_name_without_numbers():
    found = kernels(ProfileData.from_text_proto(trace(ONE_GPU)), steps=2)
    assert found == [Kernel("matmul_#x#", 0.5, 35), Kernel("fusion_#", 1, 15), Kernel("memcpy", 0.5, 2)]
    assert table(found, most=1).splitlines() == [
        "      52.0 us 100.0 %     2.0 x  all kernels",
        "      35.0 us  67.3 %     0.5 x  matmul_#x#",
        "      17.0 us  32.7 %     1.5 x  2 others",
    ]


def test_several_gpus_give_their_mean():
    planes = ONE_GPU | {"/device:GPU:1": {"Stream #13(Compute)": [("fusion_1", 50)]}}
    assert Kernel("fusion_#", 1.5, 40) in kernels(ProfileData.from_text_proto(trace(planes)))


def test_waits_are_the_times_without_any_kernel():
    """Kernels of two streams overlap. The first two start together, and the third starts 5 us after both have ended."""
    starts = {"fusion_1": (0, 30), "fusion_2": (10, 5), "matmul_3": (35, 10), "fusion_4": (65, 1)}
    events = {
        name: f"metadata_id: {i} offset_ps: {start * 10**6} duration_ps: {us * 10**6}"
        for i, (name, (start, us)) in enumerate(starts.items(), 1)
    }
    names = " ".join(
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for i, name in enumerate(events, 1)
    )
    streams = [("fusion_2", "matmul_3"), ("fusion_1", "fusion_4")]
    lines = " ".join(
        f'lines {{ name: "Stream #{i}" {" ".join(f"events {{ {events[name]} }}" for name in stream)} }}'
        for i, stream in enumerate(streams)
    )
    data = ProfileData.from_text_proto(f'planes {{ name: "/device:GPU:0" {names} {lines} }}')
    found = waits(data, steps=2)
    assert found == [Wait("matmul_#", "fusion_#", 0.5, 10), Wait("fusion_#", "matmul_#", 0.5, 2.5)]
    assert table_of_waits(found, most=1).splitlines() == [
        "      12.5 us             1.0 x  between kernels",
        "      10.0 us             0.5 x  matmul_# ... fusion_#",
    ]


def test_the_newest_trace_of_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernel_table", str(tmp_path), "--steps", "1"])
    with pytest.raises(SystemExit, match=r"holds no trace \(\*\.xplane\.pb\): name a folder"):
        kernel_table.main()
    path = tmp_path / "plugins" / "host.xplane.pb"
    path.parent.mkdir()
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(trace(ONE_GPU)))
    assert kernels(read_trace(tmp_path))[0] == Kernel("matmul_#x#", 1, 70)
    kernel_table.main()
    printed = capsys.readouterr().out
    assert "70.0 us" in printed
    assert "between kernels" in printed
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(trace({"/host:CPU": {}})))
    with pytest.raises(SystemExit, match=r"no GPU: record it"):
        kernel_table.main()
    monkeypatch.setattr(sys, "argv", ["kernel_table", str(tmp_path), "--steps", "0"])
    with pytest.raises(SystemExit):
        kernel_table.main()
    assert "--steps 0 and --most 40 must be at least 1" in capsys.readouterr().err
