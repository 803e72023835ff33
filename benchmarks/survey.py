"""Compares the tile that `auto` picks with all others and with torch, on random shapes: suite "survey"."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Row, Session
from benchmarks.peers import torch_grouped_mm
from benchmarks.problems import BACKENDS, Grouped
from jax_latent_moe import UnsupportedError
from jax_latent_moe.grouped_matmul import Bound, Operands, problem, select
from jax_latent_moe.grouped_matmul.problem import Contraction
from jax_latent_moe.grouped_matmul.tuning.timing import jax_candidate, prepare, time_in_turn

PASSES: dict[str, Contraction] = {"forward": "fwd", "dgrad": "dgrad", "wgrad": "wgrad"}
BATCH, ROUNDS = 6, 3
MOST_WEIGHTS, MOST_ROWS = 2**31, 2**29
"""The most elements of the weights, and of the wider of the two rows."""


def shapes(count: int, seed: int = 20261128) -> dict[str, Grouped]:
    """Random shapes: 16 to 896 experts, 8 to 2000 rows per expert on average, K and N from 256 to 4096."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < count:
        experts = round(float(np.exp(rng.uniform(np.log(16), np.log(896)))))
        top_k = int(rng.choice([k for k in (1, 2, 4, 6, 8, 12, 16, 22) if k <= experts // 2]))
        rows = float(np.exp(rng.uniform(np.log(8), np.log(2000)))) * experts
        tokens = max(1, round(rows / top_k))
        k, n = (64 * round(float(np.exp(rng.uniform(np.log(4), np.log(64))))) for _ in range(2))
        shape = Grouped(tokens, top_k, experts, k, n)
        if experts * k * n <= MOST_WEIGHTS and shape.rows * max(k, n) <= MOST_ROWS:
            found[f"e{experts}_k{k}_n{n}_r{shape.rows}"] = shape
    return found


def measure(session: Session, suite: str, table: dict[str, Grouped]) -> None:
    """Times every tile of each backend, and torch; records what `auto` picks, the fastest of ours, and torch."""
    for name, shape in table.items():
        x, w, dout = shape.operands(seed=0)
        sizes = jnp.asarray(shape.group_sizes(np.random.default_rng(0)))
        for pass_, contraction in PASSES.items():
            asked = problem(contraction, shape.rows, w.shape, x.dtype)
            left, right = {"fwd": (x, w), "dgrad": (dout, w), "wgrad": (x, dout)}[contraction]
            bounds = _bounds(asked)
            picked = select(asked)
            calls = {key: jax_candidate(_run(bound), left, right, sizes) for key, bound in bounds.items()}
            calls["torch_grouped_mm"] = torch_grouped_mm.candidate(pass_, x, w, dout, sizes)
            prepared = prepare(calls)
            times = time_in_turn(prepared, BATCH, ROUNDS)
            ours = {key: ms for key, ms in times.items() if key in bounds}
            if not ours:
                continue
            flops = 2.0 * shape.rows * shape.in_features * shape.out_features
            floor = session.floor_ms(flops, 2.0 * (left.size + right.size + _out_size(asked)))
            fastest = min(ours, key=lambda key: ours[key])
            for impl, key in (("auto", _key(picked)), (f"fastest/{fastest}", fastest), ("torch_grouped_mm",) * 2):
                if ms := times.get(key):
                    temp = prepared[key].temp_bytes
                    session.record(Row(suite, name, pass_, impl, ms, flops / ms / 1e9, floor, None, temp))
            listed = {key: round(ms, 4) for key, ms in sorted(times.items(), key=lambda item: item[1])}
            print(f"tiles {json.dumps({'problem': [contraction, shape.rows, *w.shape], 'ms': listed})}", flush=True)
        jax.clear_caches()


def _bounds(asked) -> dict[str, Bound]:
    """Every backend with every tile that runs the problem; `pallas`, which takes seconds to compile, with its first."""
    found = {}
    for name, backend in BACKENDS.items():
        if name == "xla":
            continue
        try:
            bound = select(asked, backend)
        except UnsupportedError as refusal:
            print(f"{'left out':>10} {name}: {refusal.reason}", flush=True)
            continue
        tiles = bound.backend.tiles(asked) if name == "cutlass" else (bound.tile,)
        found |= {_key(tiled): tiled for tile in tiles if (tiled := dataclasses.replace(bound, tile=tile))}
    return found


def _run(bound):
    return lambda lhs, rhs, sizes: bound(Operands(lhs, rhs, sizes)).out


def _key(bound) -> str:
    """The name of a decision: backend/tile."""
    sizes = "x".join(str(int(value)) for value in dataclasses.astuple(bound.tile))
    return f"{type(bound.backend).__name__.lower()}/{sizes}"


def _out_size(asked) -> int:
    if asked.contraction == "wgrad":
        return asked.num_experts * asked.k * asked.n
    return asked.num_rows * (asked.n if asked.contraction == "fwd" else asked.k)
