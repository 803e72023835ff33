"""Compares the tile that `auto` picks with all others and with torch, on random shapes: suite "survey".

Times are those of the device, since the host takes longer to dispatch a call than most of these kernels run. While one
shape is timed, the next ones are compiled.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Row, Session
from benchmarks.peers import torch_grouped_mm
from benchmarks.problems import BACKENDS, Grouped
from benchmarks.survey_summary import PEER, Compared, summary
from jax_latent_moe import UnsupportedError
from jax_latent_moe.grouped_matmul import Bound, Operands, Problem, problem, select
from jax_latent_moe.grouped_matmul.problem import Contraction
from jax_latent_moe.grouped_matmul.tuning.timing import (
    MOST_CALLS,
    device_ms,
    jax_candidate,
    prepare,
    run_once,
    start_compiling,
    time_in_turn,
)

PASSES: dict[str, Contraction] = {"forward": "fwd", "dgrad": "dgrad", "wgrad": "wgrad"}
BATCH, ROUNDS, LONG_BATCH_MS = MOST_CALLS, 3, 6
AHEAD = 2
"""Shapes that are compiled while one is timed."""
MOST_WEIGHTS, MOST_ROWS = 2**31, 2**29
"""The most elements of the weights, and of the wider of the two rows."""
DRAWN = 2**26
"""Normal values that are drawn. Longer arrays repeat them."""


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


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of a shape while its candidates compile.

    Attributes:
        shape: the name of the shape.
        pass_: a name in `PASSES`.
        asked: the problem.
        compiling: the candidates' compilations: those of our tiles by backend/tile, and torch's.
    """

    shape: str
    pass_: str
    asked: Problem
    compiling: dict[str, Future]


def measure(session: Session, suite: str, table: dict[str, Grouped]) -> None:
    """Times every tile of each backend, and torch; records what `auto` picks, the fastest of ours, and torch.

    A summary of all products is printed at the end, which may be a SIGTERM, as `timeout` sends it.
    """
    if not table:
        return
    compared: list[Compared] = []
    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1))  # the last core queues the timed calls
    with _ended_by_sigterm():
        try:
            _print_resolution(suite)
            sizes = {name: pool.submit(shape.group_sizes, np.random.default_rng(0)) for name, shape in table.items()}
            values = _values(max(max(map(math.prod, _operand_shapes(shape))) for shape in table.values()))
            compiled = (
                _start(session, pool, name, shape, values, jnp.asarray(sizes[name].result()))
                for name, shape in table.items()
            )
            for products in _ahead(compiled, AHEAD):
                for product in products:
                    compared.append(_time(session, suite, product))
        finally:
            for line in summary(compared):
                print(line, flush=True)
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise SystemExit, so that what was measured until then is summed up."""

    def end(number, frame):
        del frame
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _print_resolution(suite) -> None:
    """Prints the time of a call that does next to nothing, which no call can be below."""
    times = time_in_turn(prepare({"least": jax_candidate(jnp.negative, jnp.zeros(16))}), BATCH, ROUNDS, device_ms)
    for ms in times.values():
        print(f"{suite}: a call that negates 16 numbers takes {1e3 * ms:.1f} us", flush=True)


def _ahead[T](items: Iterable[T], count: int) -> Iterator[T]:
    """The items of a lazy iterable, each once `count` more have been made."""
    waiting = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _start(session, pool: Executor, name: str, shape: Grouped, values, sizes) -> list[Product]:
    """Makes the operands of a shape, lowers the candidates of its products, and lets the pool compile them."""
    x, w, dout = _cut(values, _operand_shapes(shape))
    products = []
    for pass_, contraction in PASSES.items():
        asked = problem(contraction, shape.rows, w.shape, x.dtype)
        left, right = {"fwd": (x, w), "dgrad": (dout, w), "wgrad": (x, dout)}[contraction]
        bounds = _bounds(session, asked)
        candidates = {key: jax_candidate(_run(bound), left, right, sizes) for key, bound in bounds.items()}
        if candidates:
            candidates[PEER] = torch_grouped_mm.candidate(pass_, x, w, dout, sizes)
        products.append(Product(name, pass_, asked, start_compiling(session.wanted(candidates), pool)))
    return products


def _operand_shapes(shape: Grouped) -> tuple[tuple[int, ...], ...]:
    """The shapes of rows [R, K], weights [E, K, N] and output gradients [R, N]."""
    weights = shape.num_experts, shape.in_features, shape.out_features
    return (shape.rows, shape.in_features), weights, (shape.rows, shape.out_features)


@functools.partial(jax.jit, static_argnums=0)
def _values(least: int) -> jax.Array:
    """A vector of at least so many normal bfloat16 values. All operands are cut from it: a cut compiles in no time."""
    drawn = min(DRAWN, least)
    return jnp.tile(jax.random.normal(jax.random.key(0), (drawn,), jnp.bfloat16), -(-least // drawn))


@functools.partial(jax.jit, static_argnums=1)
def _cut(values: jax.Array, operands: tuple[tuple[int, ...], ...]) -> tuple[jax.Array, ...]:
    """Arrays of the given shapes from the beginning of a vector."""
    return tuple(values[: math.prod(shape)].reshape(shape) for shape in operands)


def _time(session, suite, product: Product) -> Compared:
    """Times a product's candidates in turn, and records and prints the times."""
    asked = product.asked
    prepared = run_once(product.compiling)
    times = time_in_turn(prepared, BATCH, ROUNDS, device_ms, LONG_BATCH_MS)
    ours = {key: ms for key, ms in times.items() if key != PEER}
    compared = Compared(f"{product.shape} {product.pass_}", _key(select(asked)), ours, times.get(PEER))
    if not ours:
        return compared
    flops = 2.0 * asked.num_rows * asked.k * asked.n
    elements = asked.num_rows * (asked.k + asked.n) + asked.num_experts * asked.k * asked.n
    floor = session.floor_ms(flops, 2.0 * elements)
    fastest = compared.fastest
    for impl, key in (("auto", compared.picked), (f"fastest/{fastest}", fastest), (PEER, PEER)):
        if ms := times.get(key):
            temp = prepared[key].temp_bytes
            session.record(Row(suite, product.shape, product.pass_, impl, ms, flops / ms / 1e9, floor, None, temp))
    listed = {key: round(ms, 4) for key, ms in sorted(times.items(), key=lambda item: item[1])}
    described = [asked.contraction, asked.num_rows, asked.num_experts, asked.k, asked.n]
    print(f"tiles {json.dumps({'problem': described, 'ms': listed})}", flush=True)
    return compared


def _bounds(session, asked) -> dict[str, Bound]:
    """Every backend with every tile that runs the problem; `pallas`, which takes seconds to compile, with its first."""
    found = {}
    for name, backend in session.wanted(BACKENDS).items():
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
    sizes = () if bound.tile is None else dataclasses.astuple(bound.tile)
    return f"{type(bound.backend).__name__.lower()}/{'x'.join(str(int(value)) for value in sizes)}"
