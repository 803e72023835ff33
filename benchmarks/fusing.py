"""An expert's activation and its gradient, inside of a product and after it: the suite "fused" of `benchmarks.gpu`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.layers import products
from benchmarks.matmuls import relative_error
from benchmarks.measure import Row, Session
from benchmarks.problems import BACKENDS, Grouped
from jax_latent_moe import LatentMoEConfig, UnsupportedError, XlaBackend
from jax_latent_moe.experts import down_gradient, up
from jax_latent_moe.grouped_matmul import problem, select
from jax_latent_moe.grouped_matmul.timing import jax_candidate, prepare, time_in_turn

CHECKED_ROWS = 512


def backends(config: LatentMoEConfig, shape: Grouped) -> dict:
    """Each backend that runs the products: fusing nothing, under its name, and all it can, under "<name>_fused"."""
    found = {}
    for name, backend in BACKENDS.items():
        if isinstance(backend, XlaBackend):
            continue
        try:
            w_shape = shape.num_experts, shape.in_features, shape.out_features
            select(problem("rows_w", shape.rows, w_shape, config.dtype), backend)
        except UnsupportedError as refusal:
            print(f"{'left out':>10} {name}: {refusal.reason}", flush=True)
            continue
        found[name] = dataclasses.replace(backend, fuse="never")
        found[f"{name}_fused"] = dataclasses.replace(backend, fuse="always")
    return found


def measure(session: Session, suite: str, shapes: dict[str, tuple[int, LatentMoEConfig]]) -> None:
    """One row a shape, pass and implementation; errors are distances from the first of them, which fuses nothing."""
    for name, (tokens, config) in shapes.items():
        pair = products(config, tokens)
        sizes = jnp.asarray(pair["up"].group_sizes(np.random.default_rng(0)))
        rows, w_in, _ = pair["up"].operands(0)
        _, w_out, dout = pair["down"].operands(1)
        pre = jax.jit(jax.random.normal, static_argnums=(1, 2))(
            jax.random.key(2), (rows.shape[0], w_in.shape[2]), rows.dtype
        )
        row_weights = jax.random.uniform(jax.random.key(3), rows.shape[:1])
        calls = {"forward": {}, "dgrad": {}}
        for impl, backend in session.wanted(backends(config, pair["up"])).items():
            layer = dataclasses.replace(config, backend=backend)
            forward = functools.partial(up, layer, keep_pre=True)
            calls["forward"][impl] = jax_candidate(forward, rows, w_in, sizes)
            gradient = functools.partial(down_gradient, layer)
            calls["dgrad"][impl] = jax_candidate(gradient, dout, w_out, sizes, pre, row_weights)
        flops = {"forward": 2 * rows.size * w_in.shape[2], "dgrad": 2 * dout.size * w_out.shape[1]}
        for pass_, candidates in calls.items():
            _measure_pass(session, suite, name, pass_, prepare(candidates), flops[pass_])


def _measure_pass(session, suite, name, pass_, calls, flops):
    if not calls:
        return
    outs = {impl: [part[:CHECKED_ROWS] for part in call.run()] for impl, call in calls.items()}
    first = next(iter(outs.values()))
    for impl, ms in time_in_turn(calls, 3, session.rounds).items():
        error = max(
            relative_error(part, np.asarray(right, np.float32)) for part, right in zip(outs[impl], first, strict=True)
        )
        floor = session.floor_ms(flops, 0)
        session.record(Row(suite, name, pass_, impl, ms, flops / ms / 1e9, floor, error, calls[impl].temp_bytes))
