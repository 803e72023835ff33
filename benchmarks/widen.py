"""Products of bfloat16 rows by weights in codes, for few and for many tokens: the suite "widen" of `benchmarks.gpu`.

The floor is the time to read the chosen experts' codes and scales and the rows, and to write the result, at the rate
at which this device reads. Few tokens choose so few experts that the cache would hold them from call to call: a call is
then a loop over several draws of the router. The compiled kernel and the Pallas kernel run in their heuristics' tiles,
or in each of their tiles with `--sweep`. Dense weights are multiplied by the backend that `auto` chooses.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.matmuls import keep_fastest_of_sweeps, relative_error
from benchmarks.measure import Row, Session
from benchmarks.problems import Grouped
from jax_latent_moe import CutlassBackend, PallasBackend, PallasWidenTile
from jax_latent_moe.formats import ScaledArray, encode
from jax_latent_moe.grouped_matmul import grouped_matmul, operand_of, problem
from jax_latent_moe.grouped_matmul.cutlass_sm90 import tiles as cutlass_tiles
from jax_latent_moe.grouped_matmul.pallas_sm90.tiles import tiles
from jax_latent_moe.grouped_matmul.tuning.timing import Candidate, jax_candidate, prepare, time_in_turn

FORMATS = ("mxfp4", "nvfp4", "int4_32", "int4_128", "int8", "fp8_tensor", "fp8_block")
QUICK_FORMATS = ("mxfp4", "nvfp4", "int8", "fp8_block")
DRAWS, FEW_TOKENS = 8, 8
ENCODED = 32
"""Experts that are encoded. The others are copies of them, which lie elsewhere."""
SHAPES = {
    f"{name}_t{tokens}": Grouped(tokens, 22, 512, k, n, empty=0.0)
    for name, k, n in (("super_up", 1024, 2688), ("super_down", 2688, 1024))
    for tokens in (1, 8, 64, 256, 512, 1024, 4096, 8192)
}
"""The up- and the down-product of Nemotron-3 Super."""
QUICK_SHAPES = ("super_up_t256", "super_up_t512", "super_up_t1024", "super_up_t4096", "super_down_t4096")


def read_rate(elements: int = 2**30) -> float:
    """Bytes/s at which the device reads a large array."""
    array = jnp.zeros((elements,), jnp.int32)
    return array.nbytes / time_in_turn(prepare({"read": jax_candidate(jnp.max, array)}), 8)["read"] * 1e3


def encoded(w: jax.Array, name: str) -> ScaledArray:
    """The first experts of [E, K, N] in codes, and copies of them up to E."""
    few = jax.jit(encode, static_argnames="name")(w[: min(ENCODED, len(w))], name=name)
    return jax.tree.map(lambda leaf: jnp.tile(leaf, (len(w) // len(leaf), *[1] * (leaf.ndim - 1))), few)


def several(backend, rows, w, sizes):
    """The products for each draw of group sizes [D, E]: [D, R, N]."""
    return lax.map(lambda own: grouped_matmul(rows, w, own, backend=backend), sizes)


def draws(shape: Grouped) -> np.ndarray:
    """Group sizes [D, E] of several draws of a router, or of one if there are many tokens."""
    generators = map(np.random.default_rng, range(DRAWS if shape.tokens <= FEW_TOKENS else 1))
    return np.stack([shape.group_sizes(rng) for rng in generators])


def candidates(rows, w, sizes, *, sweep: bool) -> dict[str, Candidate]:
    """The product by each kernel with the heuristic's tile, or with each of a sweep's; dense weights by `auto`."""
    if not isinstance(w, ScaledArray):
        return {"bfloat16": jax_candidate(functools.partial(several, "auto"), rows, w, sizes)}
    asked = problem("fwd", rows.shape[0], w.shape, rows.dtype, rhs=operand_of(w))
    backends: dict[str, CutlassBackend | PallasBackend] = {
        f"{w.format} compiled": CutlassBackend(),
        w.format: PallasBackend(),
    }
    if sweep:
        backends = {}
        for tile in cutlass_tiles.tiles(asked):
            order = " rows first" if tile.rows_first else ""
            name = f"{w.format} compiled/{tile.rows}x{tile.columns}x{tile.stages}{order}"
            backends[name] = CutlassBackend(matmul_tile=tile)
        for tile in tiles(asked):
            assert isinstance(tile, PallasWidenTile)
            name = f"{w.format}/{tile.features}x{tile.rows}x{tile.stages} band {tile.band}"
            backends[name] = PallasBackend(widen_tile=tile)
    return {
        name: jax_candidate(functools.partial(several, backend), rows, w, sizes) for name, backend in backends.items()
    }


def traffic(shape: Grouped, w, sizes: np.ndarray) -> float:
    """Bytes that one product reads and writes: the chosen experts, the rows and the result."""
    chosen = (sizes > 0).sum(1).mean()
    return w.nbytes * chosen / shape.num_experts + 2 * shape.rows * (shape.in_features + shape.out_features)


def error_of(out, rows, w, sizes) -> float:
    """The largest relative error over the largest group of each draw, against decoded weights in float32."""
    worst = 0.0
    for result, own in zip(out, sizes, strict=True):
        expert = int(own.argmax())
        first, last = int(own[:expert].sum()), int(own[: expert + 1].sum())
        kernel = w[expert].decode("float32") if isinstance(w, ScaledArray) else w[expert]
        right = np.asarray(rows[first:last], np.float32) @ np.asarray(kernel, np.float32)
        worst = max(worst, relative_error(np.asarray(result[first:last], np.float32), right))
    return worst


def measure(session: Session, suite: str, groups: dict[str, Grouped]) -> None:
    """One row per problem and format. The kernels of all problems of one weight compile together."""
    rate = read_rate() if groups else 0.0
    if groups:
        print(f"read {rate / 1e12:.2f} TB/s", flush=True)
    by_weight: dict[tuple[int, int, int], dict[str, Grouped]] = {}
    for name, shape in groups.items():
        by_weight.setdefault((shape.num_experts, shape.in_features, shape.out_features), {})[name] = shape
    for own in by_weight.values():
        dense = next(iter(own.values())).weights(0)
        for format in (None, *(QUICK_FORMATS if session.quick else FORMATS)):
            _measure_weight(session, suite, own, dense if format is None else encoded(dense, format), rate)


def _measure_weight(session, suite, own, w, rate):
    inputs, found = {}, {}
    for name, shape in own.items():
        rows = jax.random.normal(jax.random.key(1), (shape.rows, shape.in_features), jnp.bfloat16)
        inputs[name] = rows, draws(shape)
        for impl, candidate in candidates(rows, w, jnp.asarray(inputs[name][1]), sweep=session.sweep).items():
            found[name, impl] = candidate
    made = prepare({f"{name} {impl}": candidate for (name, impl), candidate in found.items()})
    for name, shape in own.items():
        rows, sizes = inputs[name]
        prefix = f"{name} "
        calls = session.wanted({key.removeprefix(prefix): call for key, call in made.items() if key.startswith(prefix)})
        calls = keep_fastest_of_sweeps(calls)
        floor = 1e3 * max(
            2 * shape.rows * shape.in_features * shape.out_features / session.rate, traffic(shape, w, sizes) / rate
        )
        for impl, ms in time_in_turn(calls, 12, session.rounds).items():
            ms /= len(sizes)
            error = error_of(calls[impl].run(), rows, w, sizes)
            tflops = 2 * shape.rows * shape.in_features * shape.out_features / ms / 1e9
            row = Row(suite, name, "forward", impl, ms, tflops, floor, error, calls[impl].temp_bytes)
            session.record(row)
            print(f"{'':>7} {name:>22} {impl:>30} reaches {floor / ms:.2f} of the floor's speed", flush=True)
