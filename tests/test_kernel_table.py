"""The table of kernels, from traces written by hand."""

import sys

import pytest
from jax.profiler import ProfileData

from benchmarks import kernel_table
from benchmarks.kernel_table import Kernel, kernels, read_trace, table


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


def test_the_newest_trace_of_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernel_table", str(tmp_path), "--steps", "1"])
    with pytest.raises(SystemExit, match=r"holds no trace \(\*\.xplane\.pb\): name a folder"):
        kernel_table.main()
    path = tmp_path / "plugins" / "host.xplane.pb"
    path.parent.mkdir()
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(trace(ONE_GPU)))
    assert kernels(read_trace(tmp_path))[0] == Kernel("matmul_#x#", 1, 70)
    kernel_table.main()
    assert "70.0 us" in capsys.readouterr().out
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(trace({"/host:CPU": {}})))
    with pytest.raises(SystemExit, match=r"no GPU: record it"):
        kernel_table.main()
    monkeypatch.setattr(sys, "argv", ["kernel_table", str(tmp_path), "--steps", "0"])
    with pytest.raises(SystemExit):
        kernel_table.main()
    assert "--steps 0 and --most 40 must be at least 1" in capsys.readouterr().err
