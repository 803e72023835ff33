"""Curves of a run and of several runs. Each title states the result."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.train.metrics import VALIDATION

Records = list[dict[str, Any]]
DPI = 110


def series(records: Records, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """The two fields of all records that have both."""
    points = [(record[x], record[y]) for record in records if x in record and y in record]
    xs, ys = np.asarray(points, float).reshape(-1, 2).T
    return xs, ys


def loss_figure(records: Records, references: Mapping[str, float], bits: float) -> Figure:
    """Bits per byte of training and validation over the steps, with lines for compressors.

    Args:
        records: the records of a run.
        references: bits per byte of each compressor for the held-out text.
        bits: the model's bits per byte for the whole held-out text.
    """
    best = min(references, key=references.__getitem__)
    distance = references[best] - bits
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*series(records, "step", "bits_per_byte"), linewidth=1, alpha=0.6, label="training")
    names = sorted({name for record in records for name in record if name.startswith(VALIDATION)})
    for name in names:
        label = name.replace(VALIDATION, "validation").replace("/", " on ")
        axes.plot(*series(records, "step", name), marker="o", markersize=3, label=label)
    for style, (name, value) in zip(itertools.cycle((":", "--", "-.")), references.items(), strict=False):
        axes.axhline(value, color="grey", linestyle=style, linewidth=1, label=f"{name} ({value:.2f})")
    below = "below" if distance >= 0 else "above"
    axes.set(
        xlabel="step",
        ylabel="bits per byte",
        title=f"Validation ends at {bits:.2f} bits per byte, {abs(distance):.2f} {below} {best}",
    )
    _zoom(axes, [series(records, "step", name)[1] for name in ("bits_per_byte", *names)], [*references.values(), bits])
    axes.legend()
    return figure


def throughput_figure(records: Records) -> Figure:
    """Tokens a second over the steps, and the MFU if the device's peak is known."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    steps, speed = series(records, "step", "tokens_per_second")
    axes.plot(steps, speed, linewidth=1, marker="o", markersize=2)
    axes.set(xlabel="step", ylabel="tokens / s", ylim=(0, None), title=throughput(records))
    _, mfu = series(records, "step", "mfu")
    if len(mfu):
        of_peak = mfu[-1] / speed[-1]
        axes.secondary_yaxis("right", functions=(lambda y: 100 * of_peak * y, lambda y: y / of_peak / 100)).set(
            ylabel="MFU, %"
        )
    return figure


def throughput(records: Records) -> str:
    """The median speed of a run in words."""
    speed, mfu = (series(records, "step", name)[1] for name in ("tokens_per_second", "mfu"))
    if not len(speed):
        return "No speed: the run had only the step that compiles"
    share = f" at an MFU of {100 * np.median(mfu):.1f} %" if len(mfu) else ""
    return f"The median speed is {np.median(speed):,.0f} tokens a second{share}"


def comparison_figure(runs: Mapping[str, Records]) -> Figure:
    """Validation bits per byte of several runs, over steps and over seconds."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, unit in zip(panels, ("step", "seconds"), strict=True):
        for name, records in runs.items():
            axes.plot(*series(records, unit, VALIDATION), marker="o", markersize=3, label=name)
        axes.set(xlabel=unit)
    panels[0].set(ylabel="validation bits per byte")
    _zoom(panels[0], [series(records, "step", VALIDATION)[1] for records in runs.values()], [])
    panels[0].legend()
    figure.suptitle(comparison(runs))
    return figure


def comparison(runs: Mapping[str, Records]) -> str:
    """The result of a comparison in words."""
    ends = {name: series(records, "step", VALIDATION)[1][-1] for name, records in runs.items()}
    best, *others = sorted(ends, key=ends.__getitem__)
    if not others:
        return f"{best} ends at {ends[best]:.3f} bits per byte"
    return f"{best} is best with {ends[best]:.3f} bits per byte, {ends[others[0]] - ends[best]:.3f} below {others[0]}"


def _zoom(axes, curves, lines):
    """Cuts off the high losses of the first steps, which would flatten the rest. Ends and lines stay visible."""
    kept = [*lines, *(curve[-1] for curve in curves if len(curve))]
    values = np.concatenate([*curves, lines])
    if len(values):
        axes.set_ylim(values.min() - 0.1, max(*kept, min(values.max(), values.min() + 2)) + 0.1)
