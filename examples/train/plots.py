"""Pictures of a run: loss curves, expert loads; and of several runs, one against the other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

Records = list[dict[str, Any]]
DPI = 110


def series(records: Records, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """The two fields of all records that have both."""
    points = [(record[x], record[y]) for record in records if x in record and y in record]
    xs, ys = np.asarray(points, float).reshape(-1, 2).T
    return xs, ys


def plot_loss(records: Records, references: Mapping[str, float], path: Path):
    """Training and validation bits per byte against steps, with lines for what compressors need."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*series(records, "step", "bits_per_byte"), linewidth=1, alpha=0.6, label="training")
    axes.plot(*series(records, "step", "validation_bits_per_byte"), marker="o", markersize=3, label="validation")
    for style, (name, value) in zip((":", "--", "-."), references.items(), strict=False):
        axes.axhline(value, color="grey", linestyle=style, linewidth=1, label=f"{name} ({value:.2f})")
    axes.set(xlabel="step", ylabel="bits per byte")
    _zoom(axes, records, "bits_per_byte", "validation_bits_per_byte")
    axes.legend()
    figure.savefig(path, dpi=DPI)


def plot_loads(records: Records, path: Path):
    """Heat map of the experts' loads over the steps, one panel a layer; 1 is an even share."""
    steps = [record["step"] for record in records if "loads" in record]
    loads = [record["loads"] for record in records if "loads" in record]
    layers, experts = len(loads[0]), len(loads[0][0])
    figure = Figure(figsize=(7, 1 + 1.5 * layers), layout="constrained")
    panels = figure.subplots(layers, 1, sharex=True, squeeze=False)
    colours = ScalarMappable(Normalize(0, 2), "coolwarm")
    for layer, axes in enumerate(panels[:, 0]):
        extent = (0, steps[-1], experts - 0.5, -0.5)
        relative = colours.to_rgba(np.asarray([load[layer] for load in loads]).T * experts)
        axes.imshow(relative, aspect="auto", interpolation="nearest", extent=extent)
        axes.set(ylabel=f"layer {layer + 1}\nexpert")
    panels[-1, 0].set(xlabel="step")
    figure.colorbar(colours, ax=panels[:, 0], label="load / even share")
    figure.savefig(path, dpi=DPI)


def plot_throughput(records: Records, path: Path):
    """Tokens a second against the steps, and the share of the GPU's peak where it is known."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    steps, speed = series(records, "step", "tokens_per_second")
    axes.plot(steps, speed, linewidth=1)
    axes.set(xlabel="step", ylabel="tokens / s", ylim=(0, None))
    steps, mfu = series(records, "step", "mfu")
    if len(mfu):
        of_peak = mfu[-1] / speed[-1]
        axes.secondary_yaxis("right", functions=(lambda y: 100 * of_peak * y, lambda y: y / of_peak / 100)).set(
            ylabel="MFU, %"
        )
    figure.savefig(path, dpi=DPI)


def plot_comparison(runs: Mapping[str, Records], path: Path):
    """Validation bits per byte of several runs, against steps and against seconds."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, unit in zip(panels, ("step", "seconds"), strict=True):
        for name, records in runs.items():
            axes.plot(*series(records, unit, "validation_bits_per_byte"), marker="o", markersize=3, label=name)
        axes.set(xlabel=unit)
    panels[0].set(ylabel="validation bits per byte")
    _zoom(panels[0], [record for records in runs.values() for record in records], "validation_bits_per_byte")
    panels[0].legend()
    figure.savefig(path, dpi=DPI)


def _zoom(axes, records, *names):
    """Cuts off the first steps' losses, beside which nothing else could be told apart."""
    values = np.concatenate([series(records, "step", name)[1] for name in names])
    if len(values):
        axes.set_ylim(values.min() - 0.1, min(values.max(), values.min() + 2) + 0.1)
