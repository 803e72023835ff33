"""Grouped matmuls on a GPU beside every peer that is installed: suites "kernel" and "decode" of `benchmarks.gpu`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Row, Run, show
from benchmarks.peers import pallas_wgrad, tokamax_ragged_dot, torch_grouped_mm
from benchmarks.problems import BACKENDS, Grouped
from jax_latent_moe import UnsupportedError, XlaBackend
from jax_latent_moe.grouped_matmul import grouped_matmul, grouped_outer, problem, select
from jax_latent_moe.grouped_matmul.problems import Contraction
from jax_latent_moe.grouped_matmul.timing import Candidate, fastest, jax_candidate, prepare, time_in_turn

CONTRACTIONS: dict[str, Contraction] = {"forward": "rows_w", "dgrad": "rows_wt", "wgrad": "outer"}
PASSES = tuple(CONTRACTIONS)
# jax.lax.ragged_dot expands its rows over all experts on a GPU: shapes beyond this are left to others.
MOST_EXPANDED_BYTES = 30e9


def ours(pass_, backend, x, w, dout, sizes):
    """One pass by a backend of the library."""
    if pass_ == "forward":
        return grouped_matmul(x, w, sizes, backend=backend)
    if pass_ == "dgrad":
        return grouped_matmul(dout, w, sizes, transpose_w=True, backend=backend)
    return grouped_outer(x, dout, sizes, backend=backend)


def dense(pass_, x, w, dout):
    """One matmul of equal FLOPs: all rows times one weight."""
    return {"forward": lambda: x @ w[0], "dgrad": lambda: dout @ w[0].T, "wgrad": lambda: x.T @ dout}[pass_]()


def batched(pass_, x, w, dout):
    """The batched matmul of as many rows in groups that are all equal."""
    x, dout = (a.reshape(w.shape[0], -1, a.shape[1]) for a in (x, dout))
    equation = {"forward": "erk,ekn->ern", "dgrad": "ern,ekn->erk", "wgrad": "erk,ern->ekn"}[pass_]
    left, right = {"forward": (x, w), "dgrad": (dout, w), "wgrad": (x, dout)}[pass_]
    return jnp.einsum(equation, left, right)


def candidates(shape: Grouped, pass_: str, x, w, dout, sizes, *, quick: bool, decode: bool) -> dict[str, Candidate]:
    """What runs this pass, by name; a sweep's candidates are named "<peer>/<tile>"."""
    found = {}
    for name, backend in BACKENDS.items():
        asked = problem(CONTRACTIONS[pass_], shape.rows, w.shape, x.dtype)
        try:
            select(asked, backend)
        except UnsupportedError as refusal:
            print(f"{'left out':>10} {name}: {refusal.reason}", flush=True)
            continue
        found[name] = jax_candidate(functools.partial(ours, pass_, backend), x, w, dout, sizes)
    found["torch_grouped_mm"] = torch_grouped_mm.candidate(pass_, x, w, dout, sizes)
    if not decode:
        found["dense"] = jax_candidate(functools.partial(dense, pass_), x, w, dout)
        if shape.rows % shape.num_experts == 0 and not quick:
            found["dense_batched"] = jax_candidate(functools.partial(batched, pass_), x, w, dout)
    expanded = 2 * shape.rows * shape.num_experts * max(shape.in_features, shape.out_features)
    if expanded <= MOST_EXPANDED_BYTES and not quick:
        backend = XlaBackend(method="ragged_dot")
        found["lax_ragged_dot"] = jax_candidate(functools.partial(ours, pass_, backend), x, w, dout, sizes)
    for tile in (None, *tokamax_ragged_dot.sweep(pass_, quick)):
        name = "tokamax" if tile is None else f"tokamax_tuned/{tile}"
        call = functools.partial(tokamax_ragged_dot.one_pass, pass_, tile)
        found[name] = jax_candidate(call, x, w, dout, sizes)
    if pass_ == "wgrad":
        for tile in pallas_wgrad.SWEEP[: 2 if quick else None]:
            call = functools.partial(pallas_wgrad.transposed_ragged_dot, tile)
            found[f"jax_transposed_ragged_dot_mgpu/{tile}"] = jax_candidate(call, x, dout, sizes)
    return found


def keep_fastest_of_sweeps(calls: dict) -> dict:
    """Of the calls "<peer>/<tile>", the fastest of each peer, under the peer's name; a sweep may win at its default."""
    kept = {name: call for name, call in calls.items() if "/" not in name}
    for peer in {name.split("/")[0] for name in calls if "/" in name}:
        swept = {name: call for name, call in calls.items() if name.startswith(f"{peer}/")}
        if peer == "tokamax_tuned" and "tokamax" in calls:
            swept["tokamax"] = calls["tokamax"]
        best = fastest(swept)
        assert best is not None, "a peer is named for one of its calls"
        print(f"{'best of':>10} {len(swept)}: {best}", flush=True)
        kept[peer] = swept[best]
    return kept


@functools.cache
def best_tokamax_tile(shape: Grouped, pass_: str, quick: bool) -> tuple | None:
    """The fastest tile of tokamax's sweep; None, its own choice, where none of the sweep runs."""
    x, w, dout = shape.operands(0)
    sizes = jnp.asarray(shape.group_sizes(np.random.default_rng(0)))
    tiles = {f"tokamax at {tile}": tile for tile in tokamax_ragged_dot.sweep(pass_, quick)}
    calls = {name: functools.partial(tokamax_ragged_dot.one_pass, pass_, tile) for name, tile in tiles.items()}
    best = fastest(prepare({name: jax_candidate(call, x, w, dout, sizes) for name, call in calls.items()}))
    return None if best is None else tiles[best]


def max_error(pass_, out, x, w, dout, sizes) -> float:
    """The largest relative error over five experts against float32; infinite where an empty expert is not zero."""
    starts = np.cumsum(sizes) - sizes
    worst = 0.0
    for expert in {int(sizes.argmax()), 0, len(sizes) // 2, len(sizes) - 1, int(np.flatnonzero(sizes)[0])}:
        group = slice(int(starts[expert]), int(starts[expert] + sizes[expert]))
        a, b, kernel = (np.asarray(v, np.float32) for v in (x[group], dout[group], w[expert]))
        ref = {"forward": lambda a, b, k: a @ k, "dgrad": lambda a, b, k: b @ k.T, "wgrad": lambda a, b, k: a.T @ b}
        expected = ref[pass_](a, b, kernel)
        error = relative_error(out[expert] if pass_ == "wgrad" else out[group], expected)
        worst = max(worst, error)
    return worst


def relative_error(value, expected: np.ndarray) -> float:
    """||value - expected|| / ||expected||; infinite for NaN, and for anything but zeros where zeros are expected."""
    value = np.asarray(value, np.float32) if isinstance(value, jax.Array) else value.float().cpu().numpy()
    distance, size = np.linalg.norm(value - expected), np.linalg.norm(expected)
    if not np.isfinite(distance) or (size == 0 and distance > 0):
        return float("inf")
    return float(distance / size) if size else 0.0


def measure(
    run: Run, suite: str, shapes: dict[str, Grouped], ceilings: tuple[float, float], *, quick: bool, rounds: int
) -> None:
    """One row a shape, pass and implementation.

    Args:
        run: takes the rows.
        suite: "kernel", or "decode" for the forward pass alone.
        shapes: by name.
        ceilings: FLOP/s and bytes/s of the device.
        quick: shorter sweeps, fewer peers.
        rounds: batches whose median is taken.
    """
    for name, shape in shapes.items():
        sizes = shape.group_sizes(np.random.default_rng(0))
        operands = shape.operands(0)
        for pass_ in PASSES[:1] if suite == "decode" else PASSES:
            _measure_pass(run, suite, name, shape, pass_, operands, sizes, ceilings, quick, rounds)


def _measure_pass(run, suite, name, shape, pass_, operands, sizes, ceilings, quick, rounds):
    x, w, dout = operands
    decode = suite == "decode"
    found = candidates(shape, pass_, x, w, dout, jnp.asarray(sizes), quick=quick, decode=decode)
    calls = keep_fastest_of_sweeps(prepare(found))
    errors = {
        impl: max_error(pass_, call.run(), x, w, dout, sizes)
        for impl, call in calls.items()
        if not impl.startswith("dense")
    }
    flops = 2 * shape.rows * shape.in_features * shape.out_features
    matrices = shape.num_experts if pass_ == "wgrad" else int((sizes > 0).sum())
    widths = shape.in_features + shape.out_features
    traffic = 2 * (shape.rows * widths + matrices * shape.in_features * shape.out_features)
    floor = 1e3 * max(flops / ceilings[0], traffic / ceilings[1])
    for impl, ms in time_in_turn(calls, 20 if decode else 5, rounds).items():
        temp = calls[impl].temp_bytes
        row = Row(suite, name, pass_, impl, ms, flops / ms / 1e9, floor, errors.get(impl), temp)
        run.add(row)
        show(row)
