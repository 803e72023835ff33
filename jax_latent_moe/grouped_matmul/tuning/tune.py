"""Times a backend's tiles on this machine's GPU and writes the fastest into the user's table.

    python -m jax_latent_moe.grouped_matmul.tuning --rows 180224 --experts 512 --in 1024 --out 2688

All three contractions of one weight [E, K, N] are tuned, on random rows in uneven groups.
"""

import argparse
import dataclasses
import pathlib
import sys
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_latent_moe.errors import LatentMoEError, UnsupportedError
from jax_latent_moe.grouped_matmul.operands import Operands
from jax_latent_moe.grouped_matmul.problem import Contraction, Problem, problem
from jax_latent_moe.grouped_matmul.registry import BACKENDS, Bound, name_of, select
from jax_latent_moe.grouped_matmul.tuning.table import Entry, add_to_table, entry_of, file_of, user_folder
from jax_latent_moe.grouped_matmul.tuning.timing import device_ms, jax_candidate, prepare, time_in_turn

# Calls per batch. A batch of one would mislead: at its power limit, a GPU runs a tile faster after one of lower power.
BATCH, ROUNDS = 20, 3


def main(arguments: list[str] | None = None) -> int:
    """Tunes one shape; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _tune(options)
    except (LatentMoEError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_latent_moe.grouped_matmul.tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, text in (("rows", "R"), ("experts", "E"), ("in", "K"), ("out", "N; twice the inner width if gated")):
        parser.add_argument(f"--{name}", type=_positive, required=True, metavar="SIZE", help=text)
    backends = [name for name in BACKENDS if name != "xla"]
    parser.add_argument(
        "--backend", choices=("auto", *backends), default="auto", help="auto is the one that runs the shape here"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--folder", type=pathlib.Path, help="folder of the table to write; by default the one that calls read"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be an integer of at least 1")
    return int(text)


def _tune(options) -> int:
    w_shape, dtype = (options.experts, getattr(options, "in"), options.out), jnp.dtype(options.dtype)
    problems = [problem(contraction, options.rows, w_shape, dtype) for contraction in get_args(Contraction)]
    remedy = "Choose a shape that a kernel runs, and tune on the GPU that will run it."
    try:
        bounds = [select(asked, options.backend) for asked in problems]
    except UnsupportedError as error:
        raise UnsupportedError(error.backend, error.reason, remedy) from None
    entries = []
    for bound in bounds:
        name, contraction = name_of(bound.backend.config), bound.problem.contraction
        if not bound.backend.tiles(bound.problem):
            raise UnsupportedError(name, f"it has no choice of tiles for {contraction}.", remedy)
        times = time_tiles(bound)
        if not times:
            raise UnsupportedError(name, f"none of its tiles ran {contraction}.", "See the lines above.")
        entries.append(_report(bound.problem, times, name))
    folder, device = options.folder or user_folder(), problems[0].device
    add_to_table(file_of(folder, device), device, entries)
    read = "" if folder == user_folder() else f"; set JAX_LATENT_MOE_TUNING={folder} to use it"
    print(f"written to {file_of(folder, device)}{read}")
    return 0


def time_tiles(bound: Bound) -> dict[object, float]:
    """Median milliseconds of each tile that compiles and runs. Prints a line for each that fails."""
    operands = _operands(bound.problem)
    tiles = {repr(tile): tile for tile in bound.backend.tiles(bound.problem)}
    calls = {
        name: jax_candidate(_call(dataclasses.replace(bound, tile=tile)), *operands) for name, tile in tiles.items()
    }
    return {tiles[name]: ms for name, ms in time_in_turn(prepare(calls), BATCH, ROUNDS, device_ms).items()}


def _operands(asked):
    """The left and right operands, and uneven group sizes."""
    rng = np.random.default_rng(0)
    share = rng.lognormal(0, 0.42, asked.num_experts)
    group_sizes = jnp.asarray(rng.multinomial(asked.num_rows, share / share.sum()), jnp.int32)
    w_shape = asked.num_experts, asked.k, asked.n
    rows, dout = ((asked.num_rows, width) for width in w_shape[1:])
    shapes = {"fwd": (rows, w_shape), "dgrad": (dout, w_shape), "wgrad": (rows, dout)}[asked.contraction]
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    left, right = (draw(jax.random.key(i), shape, asked.lhs.format) for i, shape in enumerate(shapes))
    return left, right, group_sizes


def _call(bound):
    return lambda lhs, rhs, group_sizes: bound(Operands(lhs, rhs, group_sizes)).out


def _report(asked: Problem, times: dict, name: str) -> Entry:
    """Prints the table of one contraction, the fastest first, and returns the entry of the fastest."""
    flops = 2 * asked.num_rows * asked.k * asked.n
    print(f"{asked.contraction} on {asked.device.kind}:")
    for tile, ms in sorted(times.items(), key=lambda item: item[1]):
        print(f"  {ms:8.3f} ms {flops / ms / 1e9:5.0f} TFLOP/s  {tile!r}")
    best = min(times, key=lambda tile: times[tile])
    return entry_of(asked, name, dataclasses.asdict(best), round(times[best], 4))
