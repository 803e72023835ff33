"""The figures of a study. Equal rows and an equal version of matplotlib give equal bytes."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.study.definition import MAIN, SWEEP_SEED, Run
from examples.study.latent_scale import FIELD
from examples.study.results import Results
from examples.study.statistics import differences, interval
from examples.study.tables import BALANCING, NATS


def figures(results: Results) -> dict[str, Figure]:
    """The figures that the rows allow, by their files."""
    made = {
        "curves.png": _curves(results),
        "differences.png": _differences(results),
        "sweep.png": _sweep(results),
        "balancing.png": _balancing(results),
        "latents.png": _latents(results),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def _curves(results) -> Figure | None:
    """Validation over tokens, seconds and operations. Bands are 95 % intervals over the seeds."""
    arms = [arm for arm in results.measured if arm.name in MAIN]
    if not arms:
        return None
    base = results.study.base
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for arm in arms:
        curve, row = results.curves(arm.name, "validation"), next(iter(results.of_arm(arm.name).values()))
        mean, band = _mean_and_band(curve[:, :, 2])
        tokens = curve[0, :, 0] * base.batch_size * base.model.context
        xs = (tokens, curve[:, :, 1].mean(axis=0), tokens * row["active_flops_per_token"])
        for axes, x in zip(panels, xs, strict=True):
            _line(axes, x, mean, band, f"{arm.name}, {len(curve)} seed(s)")
    for axes, label in zip(panels, ("bytes", "seconds of training", "FLOPs"), strict=True):
        axes.set(xlabel=label)
    ends = [results.curves(arm.name, "validation")[:, :, 2].mean(axis=0) for arm in arms]
    low = min(end[-1] for end in ends)
    panels[0].set(ylabel="validation, bits per byte", ylim=(low - 0.02, max(end[len(end) // 4] for end in ends) + 0.02))
    panels[0].legend()
    return figure


def _line(axes: Axes, x, mean, band, label: str):
    (line,) = axes.plot(x, mean, linewidth=1.2, label=label)
    if band is not None:
        axes.fill_between(x, mean - band, mean + band, alpha=0.2, color=line.get_color(), linewidth=0)


def _mean_and_band(values: np.ndarray):
    """The mean over the seeds and half the interval at each point. values: [seeds, points]."""
    points = [interval(column) for column in values.T]
    band = None if points[0].half is None else np.asarray([point.half for point in points])
    return np.asarray([point.mean for point in points]), band


def _differences(results) -> Figure | None:
    """The final differences to the plain MoE with their intervals."""
    found = {arm.name: differences(results.bits(arm.name), results.bits("moe")) for arm in results.measured}
    values = {name: interval([NATS * bits for bits in of_arm]) for name, of_arm in found.items() if of_arm}
    values.pop("moe", None)
    if not values:
        return None
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(values)), layout="constrained")
    axes = figure.subplots()
    for place, value in enumerate(values.values()):
        axes.errorbar(value.mean, place, xerr=value.half, marker="o", capsize=3, color="C0")
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(values)), [f"{name} ({value.seeds})" for name, value in values.items()])
    axes.invert_yaxis()
    axes.set(xlabel="nats a byte above the plain MoE, 95 % intervals (number of seeds)")
    return figure


def _sweep(results) -> Figure | None:
    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for family, arm in results.study.families.items():
        runs = [run for rate in results.study.rates if (run := Run(arm, rate, SWEEP_SEED)) in results.rows]
        bits = [(run.learning_rate, results.rows[run]["validation_bits_per_byte"]) for run in runs]
        points = [point for point in bits if point[1] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{family} ({arm})")
    if not axes.lines:
        return None
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation, bits per byte")
    axes.legend()
    return figure


def _balancing(results) -> Figure | None:
    named = {name: results.curves(name, "busiest_expert") for name in BALANCING}
    return _over_steps(named, "load of the busiest expert over an even share")


def _latents(results) -> Figure | None:
    named = {arm.name: results.curves(arm.name, FIELD) for arm in results.measured}
    for arm in results.measured:
        named[arm.name][..., 2] *= arm.factor
    return _over_steps(named, "root mean square of the experts' latents")


def _over_steps(curves: dict[str, np.ndarray], label: str) -> Figure | None:
    """Means and intervals of curves [seeds, points, 3] over the steps."""
    there = {name: curve for name, curve in curves.items() if curve.size}
    if not there:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in there.items():
        _line(axes, curve[0, :, 0], *_mean_and_band(curve[:, :, 2]), f"{name}, {len(curve)} seed(s)")
    # An interval of two seeds is wider than the figure.
    values = np.concatenate([curve[..., 2].ravel() for curve in there.values()])
    axes.set(xlabel="step", ylabel=label, yscale="log", ylim=(values.min() / 1.2, values.max() * 1.2))
    axes.legend(fontsize="small")
    return figure
