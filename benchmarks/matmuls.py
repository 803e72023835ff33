"""Grouped matmuls on a GPU beside every peer that is installed: suites "kernel" and "decode" of `benchmarks.gpu`."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Row, Session
from benchmarks.peers import pallas_wgrad, tokamax_ragged_dot, torch_grouped_mm
from benchmarks.problems import BACKENDS, Grouped
from jax_latent_moe import UnsupportedError, XlaBackend
from jax_latent_moe.grouped_matmul import grouped_matmul, grouped_wgrad, problem, select
from jax_latent_moe.grouped_matmul.tuning.timing import Candidate, fastest, jax_candidate, prepare, time_in_turn

CONTRACTIONS: dict[str, Literal["fwd", "dgrad", "wgrad"]] = {
    "forward": "fwd",
    "dgrad": "dgrad",
    "wgrad": "wgrad",
}
PASSES = tuple(CONTRACTIONS)
# jax.lax.ragged_dot expands its rows over all experts on a GPU, so it is left out of shapes beyond this.
MOST_EXPANDED_BYTES = 30e9


def ours(pass_, backend, x, w, dout, sizes):
    """One pass by a backend of the library."""
    if pass_ == "forward":
        return grouped_matmul(x, w, sizes, backend=backend)
    if pass_ == "dgrad":
        return grouped_matmul(dout, w, sizes, transpose_w=True, backend=backend)
    return grouped_wgrad(x, dout, sizes, backend=backend)


def dense(pass_, x, w, dout):
    """One matmul of equal FLOPs: all rows times one weight."""
    return {"forward": lambda: x @ w[0], "dgrad": lambda: dout @ w[0].T, "wgrad": lambda: x.T @ dout}[pass_]()


def batched(pass_, x, w, dout):
    """The batched matmul of as many rows, in equal groups."""
    x, dout = (a.reshape(w.shape[0], -1, a.shape[1]) for a in (x, dout))
    equation = {"forward": "erk,ekn->ern", "dgrad": "ern,ekn->erk", "wgrad": "erk,ern->ekn"}[pass_]
    left, right = {"forward": (x, w), "dgrad": (dout, w), "wgrad": (x, dout)}[pass_]
    return jnp.einsum(equation, left, right)


def candidates(shape: Grouped, pass_: str, x, w, dout, sizes, *, quick: bool, decode: bool) -> dict[str, Candidate]:
    """The implementations of this pass, by name. A sweep's candidates are named "<peer>/<tile>"."""
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
    for tile in (() if quick else (None,)) + tokamax_ragged_dot.sweep(pass_, quick):
        name = "tokamax" if tile is None else f"tokamax_{'one_tile' if quick else 'tuned'}/{tile}"
        call = functools.partial(tokamax_ragged_dot.one_pass, pass_, tile)
        found[name] = jax_candidate(call, x, w, dout, sizes)
    if pass_ == "wgrad":
        for tile in pallas_wgrad.SWEEP[: 1 if quick else None]:
            call = functools.partial(pallas_wgrad.transposed_ragged_dot, tile)
            found[f"jax_transposed_ragged_dot_mgpu/{tile}"] = jax_candidate(call, x, dout, sizes)
    return found


def keep_fastest_of_sweeps(calls: dict) -> dict:
    """Replaces the calls "<peer>/<tile>" of each peer by the fastest one, under the peer's name."""
    kept = {name: call for name, call in calls.items() if "/" not in name}
    for peer in {name.split("/")[0] for name in calls if "/" in name}:
        swept = {name: call for name, call in calls.items() if name.startswith(f"{peer}/")}
        if peer == "tokamax_tuned" and "tokamax" in calls:
            swept["tokamax"] = calls["tokamax"]
        best = fastest(swept) if len(swept) > 1 else next(iter(swept))
        assert best is not None, "a peer is named for one of its calls"
        print(f"{'best of':>10} {len(swept)}: {best}", flush=True)
        kept[peer] = swept[best]
    return kept


@functools.cache
def best_tokamax_tile(shape: Grouped, pass_: str, quick: bool) -> tuple | None:
    """The fastest tile of tokamax's sweep, or the first if `quick`. None, its own choice, if none of them runs."""
    if quick:
        return tokamax_ragged_dot.sweep(pass_, quick)[0]
    x, w, dout = shape.operands(0)
    sizes = jnp.asarray(shape.group_sizes(np.random.default_rng(0)))
    tiles = {f"tokamax at {tile}": tile for tile in tokamax_ragged_dot.sweep(pass_, quick)}
    calls = {name: functools.partial(tokamax_ragged_dot.one_pass, pass_, tile) for name, tile in tiles.items()}
    best = fastest(prepare({name: jax_candidate(call, x, w, dout, sizes) for name, call in calls.items()}))
    return None if best is None else tiles[best]


def reference(pass_, x, w, dout, sizes) -> dict[int, np.ndarray]:
    """The result in float32 for some experts: the largest group's, an empty one, the first and the last."""
    starts = np.cumsum(sizes) - sizes
    experts = {int(sizes.argmax()), int(sizes.argmin()), 0, len(sizes) - 1}
    formula = {"forward": lambda a, b, k: a @ k, "dgrad": lambda a, b, k: b @ k.T, "wgrad": lambda a, b, k: a.T @ b}
    expected = {}
    for expert in experts:
        group = int(starts[expert]), int(sizes[expert])
        a, b = (in_float32(rows_of_group(array, *group, int(sizes.max()))) for array in (x, dout))
        expected[expert] = formula[pass_](a, b, in_float32(rows_of_group(w, expert, 1, 1)[0]))
    return expected


def rows_of_group(array, start: int, size: int, longest: int) -> np.ndarray:
    """array[start : start + size] in NumPy, for sizes up to `longest`. One compiled slice serves all groups."""
    if not isinstance(array, jax.Array):
        return in_float32(array[start : start + size])
    first = min(start, array.shape[0] - longest)
    return np.asarray(_slice(array, first, longest))[start - first : start - first + size]


@functools.partial(jax.jit, static_argnums=2)
def _slice(array, first, length):
    return jax.lax.dynamic_slice_in_dim(array, first, length)


def max_error(pass_, out, expected: dict[int, np.ndarray], sizes) -> float:
    """The largest relative error over the experts of `reference`; infinite if an empty expert is not zero."""
    starts = np.cumsum(sizes) - sizes
    worst = 0.0
    for expert, right in expected.items():
        if pass_ == "wgrad":
            part = rows_of_group(out, expert, 1, 1)[0]
        else:
            part = rows_of_group(out, int(starts[expert]), int(sizes[expert]), int(sizes.max()))
        worst = max(worst, relative_error(part, right))
    return worst


def in_float32(value) -> np.ndarray:
    """An array of NumPy or JAX, or a tensor of torch, as float32 in NumPy."""
    return np.asarray(value, np.float32) if isinstance(value, np.ndarray | jax.Array) else value.float().cpu().numpy()


def relative_error(value, expected: np.ndarray) -> float:
    """||value - expected|| / ||expected||; infinite for NaN, or if zeros are expected and the value is not zero."""
    value = in_float32(value)
    distance, size = np.linalg.norm(value - expected), np.linalg.norm(expected)
    if not np.isfinite(distance) or (size == 0 and distance > 0):
        return float("inf")
    return float(distance / size) if size else 0.0


def measure(session: Session, suite: str, shapes: dict[str, Grouped]) -> None:
    """One row per shape, pass and implementation. The suite "decode" has only the forward pass."""
    for name, shape in shapes.items():
        sizes = shape.group_sizes(np.random.default_rng(0))
        operands = shape.operands(0)
        for pass_ in PASSES[:1] if suite == "decode" else PASSES:
            _measure_pass(session, suite, name, shape, pass_, operands, sizes)


def _measure_pass(session, suite, name, shape, pass_, operands, sizes):
    x, w, dout = operands
    decode = suite == "decode"
    found = candidates(shape, pass_, x, w, dout, jnp.asarray(sizes), quick=session.quick, decode=decode)
    calls = keep_fastest_of_sweeps(prepare(session.wanted(found)))
    expected = reference(pass_, x, w, dout, sizes)
    errors = {
        impl: max_error(pass_, call.run(), expected, sizes)
        for impl, call in calls.items()
        if not impl.startswith("dense")
    }
    flops = 2 * shape.rows * shape.in_features * shape.out_features
    matrices = shape.num_experts if pass_ == "wgrad" else int((sizes > 0).sum())
    widths = shape.in_features + shape.out_features
    traffic = 2 * (shape.rows * widths + matrices * shape.in_features * shape.out_features)
    floor = session.floor_ms(flops, traffic)
    for impl, ms in time_in_turn(calls, 20 if decode else 12, session.rounds).items():
        error, temp = errors.get(impl), calls[impl].temp_bytes
        session.record(Row(suite, name, pass_, impl, ms, flops / ms / 1e9, floor, error, temp))
