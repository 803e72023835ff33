"""The tables of a study in Markdown. Equal rows give equal bytes."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from examples.study.definition import SWEEP_SEED, Run
from examples.study.latent_scale import FIELD
from examples.study.results import Results
from examples.study.statistics import Interval, deviation, differences, interval, resolved

REFERENCES = ("moe", "half")
"""The arms that others are compared with."""
BALANCING = ("half-pre", "sign", "switch", "quantile")
NATS = math.log(2)
"""Nats of a bit."""


def tables(results: Results) -> str:
    """All tables, one below the other."""
    parts: dict[str, Callable[[Results], str]] = {
        "Validation": _validation,
        "Paired differences in nats a byte": _differences,
        "What difference can be resolved": _resolution,
        "Sweep of the learning rate": _sweep,
        "Balancing": _balancing,
        "Root mean square of the latents that the experts read": _latents,
        "Where the rows come from": _origin,
    }
    return f"# Study {results.study.name}\n" + "".join(
        f"\n## {name}\n\n{make(results)}" for name, make in parts.items()
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return "There is no row for this table yet.\n"
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *lines))


def _with_interval(value: Interval) -> str:
    return f"{value.mean:.4f}" if value.half is None else f"{value.mean:.4f} ± {value.half:.4f}"


def _validation(results):
    lines = []
    for arm in results.study.arms:
        rows, bits = results.of_arm(arm.name), results.bits(arm.name)
        if not rows:
            continue
        row = next(iter(rows.values()))
        seeds = f"{len(bits)}" + f", {len(results.diverged(arm.name))} diverged" * bool(results.diverged(arm.name))
        speeds = [row["tokens_per_second"] for row in rows.values() if row["tokens_per_second"]]
        lines.append(
            [
                arm.name,
                arm.words,
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['active_flops_per_token'] / 1e6:.2f}",
                f"{row['learning_rate']:g}",
                seeds,
                _with_interval(interval([*bits.values()])) if bits else "diverged",
                _ends(results.curves(arm.name, "busiest_expert")),
                f"{np.median(speeds):,.0f}" if speeds else "",
            ]
        )
    head = [
        "arm",
        "feed-forward",
        "M parameters",
        "MFLOP / token",
        "learning rate",
        "seeds",
        "bits / byte",
        "busiest expert at the end",
        "tokens / s",
    ]
    return _table(head, lines)


def _differences(results):
    lines = []
    for reference in REFERENCES:
        for arm in results.measured:
            found = differences(results.bits(arm.name), results.bits(reference))
            if arm.name == reference or not found:
                continue
            value = interval([NATS * bits for bits in found])
            low, high = (value.mean + sign * (value.half or 0) for sign in (-1, 1))
            lines.append(
                [
                    f"{arm.name} - {reference}",
                    f"{value.seeds}",
                    f"{value.mean:+.4f}",
                    "" if value.half is None else f"{low:+.4f} to {high:+.4f}",
                    "" if value.half is None else "yes" if value.excludes_zero else "no",
                ]
            )
    return _table(["difference", "seeds", "mean", "95 % interval", "excludes 0"], lines)


def _resolution(results):
    """The noise of a seed, and the differences that it leaves visible."""
    dense, moe = results.bits("dense"), results.bits("moe")
    noise = {
        "dense": [*dense.values()],
        "moe": [*moe.values()],
        "dense - moe, paired": differences(dense, moe),
    }
    lines = []
    for name, values in noise.items():
        spread = deviation([NATS * value for value in values])
        if spread is not None:
            bounds = [f"{resolved(spread, seeds):.4f}" for seeds in (3, 5)]
            lines.append([name, f"{len(values)}", f"{spread:.5f}", *bounds])
    return _table(["nats a byte", "seeds", "standard deviation", "resolved by 3 seeds", "by 5 seeds"], lines)


def _sweep(results):
    lines = []
    for family, arm in results.study.families.items():
        runs = {rate: Run(arm, rate, SWEEP_SEED) for rate in results.study.rates}
        if not any(run in results.rows for run in runs.values()):
            continue
        chosen = results.rates.get(family)
        cells = []
        for rate, run in runs.items():
            bits = results.rows[run]["validation_bits_per_byte"] if run in results.rows else None
            missing = "diverged" if run in results.rows else ""
            cell = missing if bits is None else f"{bits:.4f}"
            cells.append(f"**{cell}**" if rate == chosen else cell)
        edge = chosen in (min(runs), max(runs))
        lines.append([family, arm, *cells, "" if chosen is None else "yes" if edge else "no"])
    rates = [f"{rate:g}" for rate in results.study.rates]
    return _table(["family", "arm", *rates, "best at the edge"], lines)


def _at(curve: np.ndarray, share: float) -> float:
    """The mean over the seeds at a share of the steps. curve: [seeds, points, 3]."""
    point = max(0, math.ceil(share * curve.shape[1]) - 1)
    return float(curve[:, point, 2].mean())


def _ends(curve: np.ndarray) -> str:
    """The smallest and the largest last value of the seeds. curve: [seeds, points, 3]."""
    return f"{curve[:, -1, 2].min():.2f} to {curve[:, -1, 2].max():.2f}" if curve.size else ""


def _balancing(results):
    lines = []
    for name in BALANCING:
        curve, bits = results.curves(name, "busiest_expert"), results.bits(name)
        if curve.size:
            loads = [f"{_at(curve, share):.2f}" for share in (0.0, 0.1, 0.5, 1.0)]
            above = [NATS * value for value in differences(bits, results.bits(BALANCING[0]))]
            paired = _with_interval(interval(above)) if above and name != BALANCING[0] else ""
            lines.append(
                [name, f"{len(bits)}", _with_interval(interval([*bits.values()])), paired, *loads, _ends(curve)]
            )
    at = ["busiest expert at first", "at 10 % of the steps", "at 50 %", "at the end", "at the end, by seed"]
    return _table(["arm", "seeds", "bits / byte", f"nats a byte above {BALANCING[0]}", *at], lines)


def _latents(results):
    lines = []
    for arm in results.measured:
        curve = arm.factor * results.curves(arm.name, FIELD)
        if curve.size:
            scales = [f"{_at(curve, share):.3f}" for share in (0.0, 0.5, 1.0)]
            lines.append([arm.name, arm.words, f"{len(curve)}", *scales])
    return _table(["arm", "feed-forward", "seeds", "first validation", "halfway", "end"], lines)


def _origin(results):
    rows = [results.rows[run] for run in results.queue if run in results.rows]
    devices = sorted({row["device"] for row in rows})
    versions = sorted({", ".join(f"{name} {value}" for name, value in row["versions"].items()) for row in rows})
    base, complete = results.study.base, len(results.rates) == len(results.study.families)
    facts = {
        "rows": f"{len(rows)} of {len(results.queue)}" + ("" if complete else " so far, the sweep is not complete"),
        "missing": ", ".join(run.name for run in results.missing) or "none",
        "text, SHA-256": results.study.text_sha256,
        "steps": f"{base.steps} of {base.batch_size} x {base.model.context} bytes",
        "FLOPs of a run": ", ".join(sorted({f"{row['run_flops']:.3g}" for row in rows})),
        "devices": ", ".join(devices),
        "versions": "; ".join(versions),
    }
    return _table(["what", "value"], [[name, value] for name, value in facts.items()])
