"""The recorded rows of the suite "train" as tables: tokens a second, MFU, ratios, memory, compilation."""

from benchmarks.tables import Rows, markdown, problems
from benchmarks.train import SIZES
from examples.train.flops import PEAKS

LABELS = {
    "latent_moe": "latent MoE",
    "latent_moe fp8": "latent MoE, experts in FP8",
    "moe": "MoE of equal FLOPs",
    "dense": "dense of equal FLOPs",
}
SAME = ("suite", "run", "shape", "impl")
"""What a loop and the compiled step beside it have in common."""


def peak_of(device: str) -> float | None:
    """The datasheet's rate of a device, by its name in the rows."""
    names = [name for name in PEAKS if name.lower().replace(" ", "-") in device]
    return PEAKS[max(names, key=len)] if names else None


def train_table(rows: Rows, device: str) -> str:
    """One line a size and model: a step on text, tokens a second, MFU, its ratios, its memory and its compilation.

    Weak scaling is the tokens a second of each of several GPUs over those of one GPU in the same run.
    """
    found, peak, lines = problems(rows, "train", device), peak_of(device), []
    for size, config in SIZES.items():
        steps = found.get((size, "text"), {})
        for impl, row in steps.items():
            tokens = config.batch_size * config.model.context * _growth(impl) / row["ms"] * 1e3
            share = f"{100 * row['tflops'] * 1e12 / peak:.1f} %" if peak else ""
            others = {name: found.get((size, name), {}).get(impl) for name in ("random", "loop", "compile")}
            dense, alone = steps.get("dense"), steps.get("latent_moe")
            lines.append([
                f"`{size}`",
                LABELS.get(impl, impl.replace("latent_moe", LABELS["latent_moe"])),
                f"{row['ms']:.1f} ms",
                f"{tokens / 1e3:,.0f} k",
                share,
                _ratio(row, others["random"]),
                _ratio(others["loop"], _step_beside(rows, others["loop"])),
                "" if impl == "dense" else _ratio(row, dense),
                _ratio(alone, row) if _growth(impl) > 1 else "",
                f"{row['temp_bytes'] / 1e9:.1f} GB",
                f"{others['compile']['ms'] / 1e3:.0f} s" if others["compile"] else "",
            ])  # fmt: skip
    heads = [
        "size",
        "model",
        "step",
        "tokens/s",
        "MFU",
        "text / random",
        "loop / step",
        "/ dense",
        "weak scaling",
        "temporary",
        "compile",
    ]
    return markdown(heads, lines)


def _step_beside(rows: Rows, loop: dict | None) -> dict | None:
    """The row of the compiled step on text in the same run."""
    same = [row for row in rows if loop and row["pass"] == "text" and all(row[key] == loop[key] for key in SAME)]
    return same[0] if same else None


def _growth(impl: str) -> int:
    """How many times the batch of one GPU it trains on: `latent_moe data=4 float32` on 4."""
    return int(impl.partition("=")[2].split()[0]) if "=" in impl else 1


def _ratio(row: dict | None, other: dict | None) -> str:
    return f"x {row['ms'] / other['ms']:.2f}" if row and other else ""
