"""The routed experts with their activation inside of a product and after it: the suite "fused" of `benchmarks.gpu`.

The pass "forward" is the up-projection of tokens with its activation, as in training. "forward_backward" is the whole
routed block, from tokens to all gradients. No part of the backward pass is timed alone: a fused gradient overwrites the
residual, so the time would include a copy that saves the residual.
"""

import dataclasses
import functools

import jax
import numpy as np

from benchmarks.layers import products
from benchmarks.matmuls import relative_error
from benchmarks.measure import Row, Session
from benchmarks.problems import BACKENDS, Grouped
from jax_latent_moe import LatentMoEConfig, UnsupportedError, XlaBackend
from jax_latent_moe.expert_plan import plan_experts
from jax_latent_moe.experts import routed_experts, up
from jax_latent_moe.grouped_matmul import problem, select
from jax_latent_moe.grouped_matmul.tuning.timing import jax_candidate, prepare, time_in_turn
from jax_latent_moe.routing.permute import make_dispatch_plan, rows_of

CHECKED_ROWS = 512


def backends(config: LatentMoEConfig, shape: Grouped) -> dict:
    """Each backend that runs the products. "<name>" fuses nothing, and "<name>_fused" all that it can."""
    found = {}
    for name, backend in BACKENDS.items():
        if isinstance(backend, XlaBackend):
            continue
        try:
            w_shape = shape.num_experts, shape.in_features, shape.out_features
            select(problem("fwd", shape.rows, w_shape, config.dtype), backend)
        except UnsupportedError as refusal:
            print(f"{'left out':>10} {name}: {refusal.reason}", flush=True)
            continue
        found[name] = dataclasses.replace(backend, fuse="never")
        found[f"{name}_fused"] = dataclasses.replace(backend, fuse="always")
    return found


def up_alone(config: LatentMoEConfig, rows, w_in, w_out, group_sizes):
    """The results of an up-projection: hidden rows for the down-projection, perhaps behind the gate, and the residual.

    Hidden rows behind the gate are part of the residual: cutting them out would be timed too.
    """
    plan = plan_experts(config, rows.shape[0], w_in.shape, w_out.shape, w_in.dtype)
    outputs = up(plan, plan.up, rows, w_in, group_sizes)
    assert outputs.residual is not None, "a gradient follows"
    return (outputs.out, outputs.residual) if plan.residual == "pre" else (outputs.residual,)


def block_with_gradients(config: LatentMoEConfig, tokens, weights, w_in, w_out, plan, dout):
    """The routed block's output and the gradients of all its inputs."""

    def block(tokens, weights, w_in, w_out):
        return routed_experts(config, tokens, weights, w_in, w_out, plan)

    out, pullback = jax.vjp(block, tokens, weights, w_in, w_out)
    out, dout = jax.lax.optimization_barrier((out, dout))  # as in training, where a loss separates them
    return out, *pullback(dout)


def measure(session: Session, suite: str, shapes: dict[str, tuple[int, LatentMoEConfig]]) -> None:
    """One row per shape, pass and implementation. Errors are relative to the first, which fuses nothing."""
    for name, (num_tokens, config) in shapes.items():
        pair = products(config, num_tokens)
        w_in, w_out = (pair[each].weights(seed) for seed, each in enumerate(("up", "down")))
        w_in, w_out = (w / w.shape[1] ** 0.5 for w in (w_in, w_out))
        keys = jax.random.split(jax.random.key(2), 4)
        _, ids = jax.lax.top_k(jax.random.normal(keys[0], (num_tokens, config.num_experts)), config.top_k)
        plan = jax.jit(make_dispatch_plan, static_argnums=1)(ids, config.num_experts)
        weights = jax.random.uniform(keys[1], ids.shape)
        tokens, dout = (jax.random.normal(key, (num_tokens, config.latent_width), w_in.dtype) for key in keys[2:])
        calls = {"forward": {}, "forward_backward": {}}
        for impl, backend in session.wanted(backends(config, pair["up"])).items():
            layer = dataclasses.replace(config, backend=backend)
            forward, block = functools.partial(up_alone, layer), functools.partial(block_with_gradients, layer)
            calls["forward"][impl] = jax_candidate(forward, rows_of(tokens, plan), w_in, w_out, plan.group_sizes)
            calls["forward_backward"][impl] = jax_candidate(block, tokens, weights, w_in, w_out, plan, dout)
        up_flops = 2 * pair["up"].rows * w_in.shape[1] * w_in.shape[2]
        down_flops = 2 * pair["down"].rows * w_out.shape[1] * w_out.shape[2]
        flops = {"forward": up_flops, "forward_backward": 3 * (up_flops + down_flops)}
        for pass_, candidates in calls.items():
            hidden_width = config.expert_intermediate_size if pass_ == "forward" else None
            _measure_pass(session, suite, name, pass_, prepare(candidates), flops[pass_], hidden_width)


def _measure_pass(session, suite, name, pass_, calls, flops, hidden_width):
    if not calls:
        return
    outs = {impl: _checked(call.run(), hidden_width) for impl, call in calls.items()}
    first = next(iter(outs.values()))
    for impl, ms in time_in_turn(calls, 3, session.rounds).items():
        pairs = zip(outs[impl], first, strict=True)
        error = max(relative_error(part, np.asarray(right, np.float32)) for part, right in pairs)
        floor = session.floor_ms(flops, 0)
        session.record(Row(suite, name, pass_, impl, ms, flops / ms / 1e9, floor, error, calls[impl].temp_bytes))


def _checked(outs, hidden_width):
    """The first rows of every output; of an up-projection only the hidden rows, since residuals differ."""
    return [part[:CHECKED_ROWS] for part in outs] if hidden_width is None else [outs[0][:CHECKED_ROWS, -hidden_width:]]
