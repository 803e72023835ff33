"""The plot of the README: Nemotron-3 Super's kernels and layer on one GPU, beside the peers of the same run."""

import io

from benchmarks import tables

# By family: its colour, and its implementations among the kernels and among the layers.
FAMILIES = {
    "cutlass": ("#1b5e20", "cutlass", "cutlass"),
    "pallas": ("#43a047", "pallas", "pallas"),
    "torch grouped_mm (layer: transformers)": ("#ee8a2b", "torch_grouped_mm", "transformers_grouped_mm"),
    "tokamax, one tile (layer: in plain JAX)": ("#5b8bd0", "tokamax_one_tile", "jax_tokamax_one_tile"),
    "one dense matmul": ("#9e9e9e", "dense", "dense"),
}
KERNELS = {
    f"{side}\n{tables.PASSES[pass_]}": (f"super_{side}_t8192", pass_)
    for side in ("up", "down")
    for pass_ in ("forward", "dgrad", "wgrad")
}
LAYERS = {tables.PASSES[pass_]: ("super_t8192", pass_) for pass_ in ("forward", "forward_backward")}
BAR = 0.84
"""The width of a group of bars."""


def render(rows: tables.Rows, device: str) -> str:
    """The plot as SVG. The same rows always give the same text."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9.5, 3.6))
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [2.4, 1]})
    figure.subplots_adjust(left=0.05, right=0.995, bottom=0.24, top=0.82, wspace=0.12)
    left.set_title("grouped matmuls, TFLOP/s: higher is better", fontsize=8)
    right.set_title("the layer's routed part, ms: lower is better", fontsize=8)
    shown = _bars(left, tables.problems(rows, "kernel", device), KERNELS, 1, "tflops", "{:.0f}")
    shown |= _bars(right, tables.problems(rows, "layer", device), LAYERS, 2, "ms", "{:.1f}")
    figure.suptitle(f"Nemotron-3 Super, 8192 tokens, bfloat16, one NVIDIA {device.upper()}", fontsize=10)
    legend = [Patch(color=colour, label=name) for name, (colour, *_) in FAMILIES.items() if name in shown]
    figure.legend(handles=legend, fontsize=7, frameon=False, ncols=max(1, len(legend)), loc="lower center")
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "jax_latent_moe", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # matplotlib leaves blanks at the end of some lines.
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _bars(axes, problems, wanted, member, field, style) -> set[str]:
    """Draws a group of bars per problem and a bar per family, with its value on top; returns the families drawn."""
    impls = {name: family[member] for name, family in FAMILIES.items()}
    shown = [name for name, impl in impls.items() if any(impl in problems.get(key, {}) for key in wanted.values())]
    width = BAR / max(len(shown), 1)
    for i, name in enumerate(shown):
        values = [problems.get(key, {}).get(impls[name], {}).get(field) for key in wanted.values()]
        places = [x - BAR / 2 + (i + 0.5) * width for x, value in enumerate(values) if value is not None]
        heights = [value for value in values if value is not None]
        bars = axes.bar(places, heights, 0.94 * width, color=FAMILIES[name][0])
        axes.bar_label(bars, [style.format(value) for value in heights], fontsize=5.5)
    axes.set_xticks(range(len(wanted)), wanted, fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    return set(shown)
