"""Recorded rows as Markdown tables. A line is one problem, from the newest run that measured it."""

import json
import math
import pathlib
from collections.abc import Iterable

from benchmarks.measure import RESULTS
from benchmarks.problems import BACKENDS

Rows = list[dict]
SUITES = ("compile", "kernel", "fused", "layer", "decode", "step")
# The implementations in the order of the columns, with their names for readers.
LABELS = {
    "cutlass": "cutlass",
    "cutlass_fused": 'cutlass, `fuse="always"`',
    "pallas": "pallas",
    "pallas_fused": 'pallas, `fuse="always"`',
    "xla": "xla",
    "torch_grouped_mm": "torch `grouped_mm`",
    "transformers_grouped_mm": "transformers on `grouped_mm`",
    "sonicmoe": "SonicMoE",
    "tokamax": "tokamax",
    "tokamax_tuned": "tokamax, best of a sweep",
    "tokamax_one_tile": "tokamax, one tile",
    "jax_tokamax_default": "JAX + tokamax",
    "jax_tokamax_tuned": "JAX + tokamax, best of a sweep",
    "jax_tokamax_one_tile": "JAX + tokamax, one tile",
    "jax_transposed_ragged_dot_mgpu": "JAX's `transposed_ragged_dot_mgpu`",
    "lax_ragged_dot": "`lax.ragged_dot`",
    "dense": "one dense matmul",
    "dense_batched": "batched, equal groups",
}
PASSES = {
    "forward": "forward",
    "dgrad": "input gradient",
    "wgrad": "weight gradient",
    "forward_backward": "forward and backward",
}
WRONG = 0.1
"""A result with at least this relative error counts as wrong."""


def load(folder: pathlib.Path = RESULTS) -> Rows:
    """Every recorded row, in the order of the files' dates and of their lines."""
    paths = sorted(folder.glob("*.jsonl"), key=lambda path: (path.stem[-len("2026-01-01") :], path.name))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def devices(rows: Rows) -> list[str]:
    """The GPUs of the rows."""
    return sorted({row["device"] for row in rows} - {"cpu"})


def problems(rows: Rows, suite: str, device: str) -> dict[tuple[str, str], dict[str, dict]]:
    """By shape and pass: the row of each implementation in the newest run that measured the problem."""
    found = {}
    for row in rows:
        if (row["suite"], row["device"]) == (suite, device):
            key = row["shape"], row["pass"]
            if key not in found or next(iter(found[key].values()))["run"] != row["run"]:
                found[key] = {}
            found[key][row["impl"]] = row
    return found


def fastest_of_ours(impls: dict[str, dict]) -> dict | None:
    """The row of the library's fastest backend."""
    return min((impls[name] for name in BACKENDS if name in impls), key=lambda row: row["ms"], default=None)


def table(rows: Rows, suite: str, device: str, *, memory: bool = False) -> str:
    """Milliseconds by problem and implementation, and temporary gigabytes with `memory`.

    Parentheses hold a peer's time over that of the library's fastest backend, and the floor's share of that time.
    """
    found = problems(rows, suite, device)
    names = [name for name in LABELS if any(name in impls for impls in found.values())]
    lines = []
    for (shape, pass_), impls in found.items():
        ours = fastest_of_ours(impls)
        floor = next(iter(impls.values()))["floor_ms"]
        share = f" ({100 * floor / ours['ms']:.0f} %)" if ours else ""
        cells = [_cell(impls.get(name), ours, memory) for name in names]
        lines.append([f"`{shape}`", PASSES[pass_], *cells, f"{three_digits(floor)}{share}"])
    return markdown(["problem", "pass", *(LABELS[name] for name in names), "floor"], lines)


def _cell(row: dict | None, ours: dict | None, memory: bool) -> str:
    if row is None:
        return ""
    wrong = "†" if row["max_error"] is not None and row["max_error"] > WRONG else ""
    ratio = f" (x {row['ms'] / ours['ms']:.2f})" if ours and row["impl"] not in BACKENDS else ""
    temp = f", {row['temp_bytes'] / 1e9:.1f} GB" if memory and row["temp_bytes"] is not None else ""
    return f"{three_digits(row['ms'])}{wrong}{ratio}{temp}"


def three_digits(value: float) -> str:
    """The value with three significant digits, or more if it has more digits before the point."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def compile_table(rows: Rows, device: str) -> str:
    """Seconds that the layers take to trace and compile, by backend."""
    found = problems(rows, "compile", device)
    names = [name for name in BACKENDS if any(name in impls for impls in found.values())]
    lines = [
        [f"`{shape}`", PASSES[pass_], *(f"{impls[name]['ms'] / 1e3:.1f} s" if name in impls else "" for name in names)]
        for (shape, pass_), impls in found.items()
    ]
    return markdown(["layer", "pass", *names], lines)


def cpu_table(rows: Rows) -> str:
    """The portable backend's methods on a CPU, by number of experts."""
    lines = []
    for (shape, _), impls in problems(rows, "kernel", "cpu").items():
        cells = []
        for name in ("xla_blocked", "xla_ragged_dot"):
            row = impls.get(name)
            cells.append("" if row is None else f"{row['ms']:.0f} ms, {row['temp_bytes'] / 2**20:.1f} MiB")
        lines.append([shape.rsplit("_e", 1)[1], *cells, f"{impls['dense']['ms']:.0f} ms"])
    return markdown(["experts", "blocked", "`lax.ragged_dot`", "one dense matmul"], lines)


def errors(rows: Rows, device: str) -> str:
    """The largest error of each implementation over every kernel, and over every layer."""
    lines = []
    for name, label in LABELS.items():
        worst = []
        for suites in (("kernel", "decode"), ("layer", "decode")):
            of_layers = "layer" in suites
            measured = [
                impls[name]["max_error"]
                for suite in suites
                for (shape, _), impls in problems(rows, suite, device).items()
                if name in impls and impls[name]["max_error"] is not None and _is_layer(suite, shape) == of_layers
            ]
            worst.append(f"{max(measured):.1e}" if measured else "")
        if any(worst):
            lines.append([label, *worst])
    return markdown(["", "kernels", "layers"], lines)


def _is_layer(suite: str, shape: str) -> bool:
    return suite == "layer" or (suite == "decode" and "_up_" not in shape)


def runs(rows: Rows, device: str) -> str:
    """The runs behind a device's tables, with the versions of what they ran."""
    found = {}
    for suite in SUITES:
        for (shape, _), impls in problems(rows, suite, device).items():
            row = next(iter(impls.values()))
            found.setdefault(row["run"], (row["versions"], set()))[1].add(shape)
    lines = [
        [
            f"`{run}`",
            ", ".join(f"`{shape}`" for shape in sorted(shapes)),
            ", ".join(f"{k} {v}" for k, v in used.items()),
        ]
        for run, (used, shapes) in found.items()
    ]
    return markdown(["run", "problems", "versions"], lines)


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))
