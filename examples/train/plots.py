"""Pictures of a run: loss curves, expert loads; and of several runs, one against the other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no display)

Records = list[dict[str, Any]]


def series(records: Records, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """The two fields of all records that have both."""
    points = [(record[x], record[y]) for record in records if x in record and y in record]
    return tuple(np.asarray(points, float).reshape(-1, 2).T)


def plot_loss(records: Records, references: Mapping[str, float], path: Path):
    """Training and validation bits per byte against steps, with lines for what compressors need."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*series(records, "step", "bits_per_byte"), linewidth=1, alpha=0.6, label="training")
    axes.plot(*series(records, "step", "validation_bits_per_byte"), marker="o", markersize=3, label="validation")
    for style, (name, value) in zip((":", "--", "-."), references.items(), strict=False):
        axes.axhline(value, color="grey", linestyle=style, linewidth=1, label=f"{name} ({value:.2f})")
    axes.set(xlabel="step", ylabel="bits per byte")
    _zoom(axes, records)
    axes.legend()
    _save(figure, path)


def plot_loads(records: Records, path: Path):
    """Heat map of the experts' loads over the steps, one panel a layer; 1 is an even share."""
    steps = [record["step"] for record in records if "loads" in record]
    loads = np.asarray([record["loads"] for record in records if "loads" in record])
    relative = loads.transpose(1, 2, 0) * loads.shape[2]
    figure, panels = plt.subplots(
        len(relative), 1, figsize=(7, 1 + 1.5 * len(relative)), sharex=True, squeeze=False, layout="constrained"
    )
    image = None
    for layer, axes in enumerate(panels[:, 0]):
        extent = (0, steps[-1], loads.shape[2] - 0.5, -0.5)
        image = axes.imshow(
            relative[layer], aspect="auto", interpolation="nearest", extent=extent, cmap="coolwarm", vmin=0, vmax=2
        )
        axes.set(ylabel=f"layer {layer + 1}\nexpert")
    panels[-1, 0].set(xlabel="step")
    figure.colorbar(image, ax=panels[:, 0], label="load / even share")
    _save(figure, path)


def plot_comparison(runs: Mapping[str, Records], path: Path):
    """Validation bits per byte of several runs, against steps and against seconds."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axes, unit in zip(panels, ("step", "seconds"), strict=True):
        for name, records in runs.items():
            axes.plot(*series(records, unit, "validation_bits_per_byte"), marker="o", markersize=3, label=name)
        axes.set(xlabel=unit)
    panels[0].set(ylabel="validation bits per byte")
    _zoom(panels[0], [record for records in runs.values() for record in records])
    panels[0].legend()
    _save(figure, path)


def _zoom(axes, records):
    """Cuts off the first steps' losses, beside which nothing else could be told apart."""
    values = np.concatenate([series(records, "step", name)[1] for name in ("validation_bits_per_byte", "bits_per_byte")])
    if len(values):
        axes.set_ylim(values.min() - 0.1, min(values.max(), values.min() + 2) + 0.1)


def _save(figure, path):
    figure.savefig(path, dpi=110)
    plt.close(figure)
