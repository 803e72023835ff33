"""Grouped matmuls and layers on a GPU beside their peers, in one run: `python -m benchmarks.gpu [suite ...]`.

All suites run by default. If a peer is missing or fails, or a backend refuses, it is left out and the reason printed.
`--quick` runs few shapes and only the first tile of a sweep.
"""

import argparse
import os
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import (
    adapters,
    coded_layers,
    fp8,
    fp8_layers,
    fusing,
    layers,
    logits,
    loop,
    matmuls,
    problems,
    shared,
    steps,
    survey,
    swapped,
    train,
    widen,
)
from benchmarks.measure import RESULTS, Run, Session, device_name
from jax_latent_moe.grouped_matmul.tuning.timing import jax_candidate, prepare, time_in_turn
from jax_latent_moe.piped import piped

SUITES = (
    "compile",
    "kernel",
    "fp8",
    "fp8_layer",
    "widen",
    "prefill",
    "lora",
    "fused",
    "layer",
    "shared",
    "ragged_dot",
    "decode",
    "logits",
    "loop",
    "step",
    "survey",
    "train",
)
Measure = Callable[[Session, str, dict], None]


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="suite", help=", ".join(SUITES))
    parser.add_argument("--quick", action="store_true", help="fewer shapes and peers, no sweeps")
    parser.add_argument("--sweep", action="store_true", help='every tile in the suite "widen"')
    parser.add_argument("--shape", action="append", metavar="NAME", help="only this shape; may be repeated")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, metavar="FOLDER", help="where the rows go")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="IMPL",
        help="not this implementation, mesh or loop; may be repeated",
    )
    parser.add_argument("--kernels", action="store_true", help='print the kernels of each step of the suite "train"')
    options = parser.parse_args()
    if unknown := set(options.suites) - set(SUITES):
        parser.error(f"no suite is called {', '.join(sorted(unknown))}: use {', '.join(SUITES)}.")
    known = {name for measured in tables(quick=False).values() for _, table in measured for name in table}
    if unknown := set(options.shape or ()) - known:
        parser.error(f"no shape is called {', '.join(sorted(unknown))}: use {', '.join(sorted(known))}.")
    return options


def tables(*, quick: bool) -> dict[str, list[tuple[Measure, dict]]]:
    """By suite: the functions that measure, and their problems by name."""

    def only(table, names):
        return {name: table[name] for name in names} if quick else table

    return {
        "compile": [(layers.measure_compilation, only(problems.LAYERS, problems.QUICK_LAYERS))],
        "kernel": [(matmuls.measure, only(problems.KERNELS, problems.QUICK_KERNELS))],
        "fp8": [(fp8.measure, only(problems.FP8, problems.QUICK_KERNELS))],
        "fp8_layer": [(fp8_layers.measure, only(fp8_layers.SHAPES, fp8_layers.QUICK_SHAPES))],
        "widen": [(widen.measure, only(widen.SHAPES, widen.QUICK_SHAPES))],
        "prefill": [(coded_layers.measure, only(coded_layers.SHAPES, coded_layers.QUICK_SHAPES))],
        "lora": [(adapters.measure, only(adapters.SHAPES, adapters.QUICK_SHAPES))],
        "fused": [(fusing.measure, problems.FUSED)],
        "layer": [(layers.measure, only(problems.LAYERS, problems.QUICK_LAYERS))],
        "shared": [(shared.measure, only(shared.SHAPES, shared.QUICK_SHAPES))],
        "ragged_dot": [(swapped.measure, swapped.SHAPES)],
        "decode": [
            (matmuls.measure, problems.DECODE_KERNELS),
            (layers.measure, only(problems.DECODE_LAYERS, problems.QUICK_DECODE_LAYERS)),
        ],
        "logits": [(logits.measure, logits.SHAPES)],
        "loop": [(loop.measure, only(loop.SHAPES, loop.QUICK_SHAPES))],
        "step": [(steps.measure, problems.STEPS)],
        "survey": [(survey.measure, survey.shapes(4 if quick else 40))],
        "train": [(train.measure, train.SIZES)],
    }


def ceilings(size: int = 8192, elements: int = 2**30) -> tuple[float, float]:
    """FLOP/s of a large bfloat16 matmul and bytes/s of a large copy, read plus written."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in (0, 1))
    buffer = jnp.zeros((elements,), jnp.bfloat16)
    calls = prepare({"matmul": jax_candidate(jnp.matmul, a, b), "copy": jax_candidate(lambda v: v + 1, buffer)})
    times = time_in_turn(calls, 8)
    return 2 * size**3 / times["matmul"] * 1e3, 2 * buffer.nbytes / times["copy"] * 1e3


def main() -> None:
    """Measures, and prints and records each row."""
    options = parse_options()
    # torch needs memory in this process, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(f"this benchmark needs a GPU, not {device.device_kind!r}: `make bench` measures the CPU.")
    name, count = device_name(), jax.device_count()
    run = Run(name if count == 1 else f"{name}-x{count}", options.out)
    limits = ceilings()
    print(f"{device.device_kind}: matmul {limits[0] / 1e12:.0f} TFLOP/s, copy {limits[1] / 1e12:.2f} TB/s", flush=True)
    rounds = 5 if options.quick else 7
    session = Session(run, *limits, options.quick, rounds, frozenset(options.without), options.kernels, options.sweep)
    for suite in options.suites or SUITES:
        for measure, table in tables(quick=options.quick)[suite]:
            chosen = {name: value for name, value in table.items() if name in (options.shape or table)}
            start = time.perf_counter()
            measure(session, suite, chosen)
            if chosen:
                print(f"{suite}: {', '.join(chosen)} in {time.perf_counter() - start:.0f} s", flush=True)
    print(f"recorded in {run.path}")


if __name__ == "__main__":
    with piped():
        main()
