"""Times a backend's tiles on the GPU at hand and writes the fastest into the user's table.

    python -m jax_latent_moe.grouped_matmul.tuning --rows 180224 --experts 512 --in 1024 --out 2688

All three contractions of one weight [E, K, N] are tuned, on random rows in uneven groups.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_latent_moe.config import NAMED_BACKENDS, BackendConfig
from jax_latent_moe.errors import LatentMoEError, UnsupportedError
from jax_latent_moe.grouped_matmul import grouped_matmul, grouped_wgrad, problem, select
from jax_latent_moe.grouped_matmul.problem import Contraction, Problem
from jax_latent_moe.grouped_matmul.tuning.table import Entry, add_to_table, user_table
from jax_latent_moe.grouped_matmul.tuning.timing import jax_candidate, prepare, time_in_turn

# Calls in a row: a GPU at its power limit runs a tile faster just after one that takes less power.
BATCH, ROUNDS = 12, 3


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
    for name, text in (("rows", "R"), ("experts", "E"), ("in", "K"), ("out", "N; twice the inner width where gated")):
        parser.add_argument(f"--{name}", type=_positive, required=True, metavar="SIZE", help=text)
    backends = [name for name in NAMED_BACKENDS if name != "xla"]
    parser.add_argument("--backend", choices=backends, default="pallas")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--table", type=pathlib.Path, help="file to write; by default the one that is read")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _tune(options) -> int:
    w_shape = (options.experts, getattr(options, "in"), options.out)
    backend, table = NAMED_BACKENDS[options.backend](), options.table or user_table()
    problems = [
        problem(contraction, options.rows, w_shape, jnp.dtype(options.dtype)) for contraction in get_args(Contraction)
    ]
    try:
        runners = [select(asked, backend) for asked in problems]
    except UnsupportedError as error:
        raise UnsupportedError(
            error.backend, error.reason, "Tune a shape it runs, on the GPU that is to run it."
        ) from None
    entries = []
    for asked, runner in zip(problems, runners, strict=True):
        times = time_tiles(asked, runner.candidates(asked))
        if not times:
            raise UnsupportedError(options.backend, f"no tile of its ran {asked.contraction}.", "See the lines above.")
        entries.append(_report(asked, times, options.backend))
    add_to_table(table, entries)
    print(f"written to {table}" + ("" if table == user_table() else "; JAX_LATENT_MOE_TUNING makes calls read it"))
    return 0


def time_tiles(asked: Problem, candidates: tuple[BackendConfig, ...]) -> dict[BackendConfig, float]:
    """Median milliseconds of each candidate that compiles and runs; a line for each that does not."""
    arguments = _operands(asked)
    configs = {repr(config): config for config in candidates}
    calls = prepare({name: jax_candidate(_call(asked, config), *arguments) for name, config in configs.items()})
    return {configs[name]: ms for name, ms in time_in_turn(calls, BATCH, ROUNDS).items()}


def _operands(asked):
    """Left and right operand and uneven group sizes."""
    rng = np.random.default_rng(0)
    share = rng.lognormal(0, 0.42, asked.num_experts)
    group_sizes = jnp.asarray(rng.multinomial(asked.num_rows, share / share.sum()), jnp.int32)
    w_shape = asked.num_experts, asked.in_features, asked.out_features
    rows, dout = ((asked.num_rows, width) for width in w_shape[1:])
    shapes = {"fwd": (rows, w_shape), "dgrad": (dout, w_shape), "wgrad": (rows, dout)}[asked.contraction]
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    left, right = (draw(jax.random.key(i), shape, asked.dtype) for i, shape in enumerate(shapes))
    return left, right, group_sizes


def _call(asked, backend):
    if asked.contraction == "wgrad":
        return functools.partial(grouped_wgrad, backend=backend)
    return functools.partial(grouped_matmul, transpose_w=asked.contraction == "dgrad", backend=backend)


def _report(asked: Problem, times: dict[BackendConfig, float], name: str) -> Entry:
    """Prints the table of one contraction, the fastest first, and returns the entry of the fastest."""
    flops = 2 * asked.num_rows * asked.in_features * asked.out_features
    print(f"{asked.contraction} on {asked.device_kind}:")
    for config, ms in sorted(times.items(), key=lambda item: item[1]):
        print(f"  {ms:8.3f} ms {flops / ms / 1e9:5.0f} TFLOP/s  {_tile(asked, config)!r}")
    best = min(times, key=lambda config: times[config])
    return {
        "device": asked.device_kind,
        "backend": name,
        "contraction": asked.contraction,
        "num_rows": asked.num_rows,
        "w_shape": [asked.num_experts, asked.in_features, asked.out_features],
        "tile": dataclasses.asdict(_tile(asked, best)),
        "ms": round(times[best], 4),
    }


def _tile(asked, config):
    choice = select(asked, config).tile(asked)
    assert choice is not None, "a candidate is a choice of tile"
    return choice.tile


if __name__ == "__main__":
    sys.exit(main())
