"""The routed part of whole layers on a GPU beside its peers: the suites "layer" and "decode" of `benchmarks.gpu`."""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.matmuls import CONTRACTIONS, PASSES, best_tokamax_tile, relative_error
from benchmarks.measure import Row, Session
from benchmarks.peers import jax_layer, sonicmoe_layer, tokamax_ragged_dot, transformers_layer
from benchmarks.problems import BACKENDS, Grouped
from jax_latent_moe import LatentMoEConfig, UnsupportedError, XlaBackend, init_params, latent_moe
from jax_latent_moe.cost import matmul_flops_per_token
from jax_latent_moe.grouped_matmul import problem, select
from jax_latent_moe.grouped_matmul.tuning.timing import (
    Call,
    Candidate,
    HostIsLate,
    device_ms,
    host_ms,
    jax_candidate,
    prepare,
    time_in_turn,
)

CHECKED_TOKENS = 256
PASSES_OF_LAYERS = ("forward", "forward_backward")
FORWARD_ONLY = ("decode", "prefill")
"""Suites without a reverse pass."""


def products(config: LatentMoEConfig, tokens: int) -> dict[str, Grouped]:
    """The two grouped matmuls of a layer: up to the hidden rows, down to the latent."""
    width, inner = config.latent_width, config.expert_intermediate_size
    up = Grouped(tokens, config.top_k, config.num_experts, width, inner * (2 if config.gated else 1))
    return {"up": up, "down": dataclasses.replace(up, in_features=inner, out_features=width)}


def refusal(config: LatentMoEConfig, tokens: int, pass_: str, backend) -> str | None:
    """The reason why a backend cannot run the layer, as a sentence; None if it can."""
    contractions = tuple(CONTRACTIONS.values())[: None if pass_ == "forward_backward" else 1]
    for shape in products(config, tokens).values():
        for contraction in contractions:
            w_shape = (shape.num_experts, shape.in_features, shape.out_features)
            try:
                select(problem(contraction, shape.rows, w_shape, config.dtype), backend)
            except UnsupportedError as error:
                return error.reason
    return None


def with_gradients(layer):
    """The call that runs a layer and its reverse pass with dy: y, and the gradients of the parameters and of x."""

    def call(params, x, dy):
        y, pullback = jax.vjp(layer, params, x)
        y, dy = jax.lax.optimization_barrier((y, dy))  # as in training, where a loss separates them
        return y, *pullback(dy)

    return call


def tokamax_layer(config: LatentMoEConfig, tiles: dict[str, list] | None):
    """The plain JAX layer on tokamax, with its own tiles or with those given for "up" and "down", one per pass."""

    def ragged_dot(rows, w, group_sizes):
        operation = tokamax_ragged_dot.operation()
        if tiles is not None:
            operation = tokamax_ragged_dot.operation(*tiles["up" if w.shape[1] == config.latent_width else "down"])
        return operation(rows, w, group_sizes=group_sizes)

    return lambda params, x: jax_layer.layer(params, x, config, ragged_dot)


def candidates(config: LatentMoEConfig, pass_: str, params, x, dy, *, session: Session) -> dict[str, Candidate]:
    """The implementations of this pass of the layer, by name."""
    layers, tokens = {}, x.shape[0]
    for name, backend in BACKENDS.items():
        if reason := refusal(config, tokens, pass_, backend):
            print(f"{'left out':>10} {name}: {reason}", flush=True)
        elif not (session.quick and name == "xla"):
            layers[name] = functools.partial(our_layer, dataclasses.replace(config, backend=backend))
    if not session.quick:
        layers["jax_tokamax_default"] = tokamax_layer(config, None)
    passes = PASSES if pass_ == "forward_backward" else PASSES[:1]
    tuned = f"jax_tokamax_{'one_tile' if session.quick else 'tuned'}"
    if tuned not in session.without:
        tiles = {
            name: [best_tokamax_tile(shape, each, session.quick) for each in passes]
            for name, shape in products(config, tokens).items()
        }
        layers[tuned] = tokamax_layer(config, tiles)
    args = (params, x) if pass_ == "forward" else (params, x, dy)
    found = {
        name: jax_candidate(layer if pass_ == "forward" else with_gradients(layer), *args)
        for name, layer in layers.items()
    }
    in_torch = {"transformers_grouped_mm": transformers_layer, "sonicmoe": sonicmoe_layer}
    return found | {name: peer.candidates(config, params, x, dy)[pass_] for name, peer in in_torch.items()}


def our_layer(config: LatentMoEConfig, params, x):
    """The layer's output, without auxiliary values."""
    return latent_moe(params, x, config)[0]


def reference(config: LatentMoEConfig, params, x) -> tuple[np.ndarray, int]:
    """The layer in float32 on the xla backend, and the experts that its tokens reached."""
    config = dataclasses.replace(config, dtype="float32", backend=XlaBackend())
    with jax.default_matmul_precision("highest"):
        y, aux = jax.jit(latent_moe, static_argnames="config")(params, x.astype(jnp.float32), config)
    return np.asarray(y), int((aux.tokens_per_expert > 0).sum())


def measure_compilation(session: Session, suite: str, layers: dict[str, tuple[int, LatentMoEConfig]]) -> None:
    """One row per layer, pass and backend: the time to trace and compile, one after the other."""
    for name, (tokens, config) in layers.items():
        params = jax.eval_shape(lambda config=config: init_params(jax.random.key(0), config))
        x = jax.ShapeDtypeStruct((tokens, config.hidden_size), jnp.bfloat16)
        for pass_ in PASSES_OF_LAYERS:
            for impl, backend in session.wanted(BACKENDS).items():
                if refusal(config, tokens, pass_, backend):
                    continue
                layer = functools.partial(our_layer, dataclasses.replace(config, backend=backend))
                forward = pass_ == "forward"
                function, args = (layer, (params, x)) if forward else (with_gradients(layer), (params, x, x))
                start = time.perf_counter()
                jax.jit(function).lower(*args).compile()
                ms = 1e3 * (time.perf_counter() - start)
                session.record(Row(suite, name, pass_, impl, ms, 0.0, 0.0, None, None))


def measure(
    session: Session, suite: str, layers: dict[str, tuple[int, LatentMoEConfig]], candidates=candidates, then=None
) -> None:
    """One row per layer (tokens and configuration), pass and implementation. Some suites have only the forward pass.

    `then(session, suite, name, pass_, calls)` measures more of the same calls.
    """
    for name, (tokens, config) in layers.items():
        params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
        x, dy = (jax.random.normal(jax.random.key(i), (tokens, config.hidden_size), jnp.bfloat16) for i in (1, 2))
        checked = reference(config, params, x[:CHECKED_TOKENS])
        for pass_ in PASSES_OF_LAYERS[: 1 if suite in FORWARD_ONLY else None]:
            found = candidates(config, pass_, params, x, dy, session=session)
            calls = prepare(session.wanted(found))
            _measure_pass(session, suite, name, config, pass_, (params, x), checked, calls)
            if then is not None:
                then(session, suite, name, pass_, calls)


def _clock(calls: dict[str, Call]) -> Callable[[Call, int], float]:
    """The clock of calls that are compared: the device's if it can time all, without the host's time to dispatch them.

    A peer that itself waits for the device has only the host's time.
    """
    if any(call.queue is None for call in calls.values()):
        return host_ms

    def clock(call, batch):
        try:
            return device_ms(call, batch)
        except HostIsLate:
            return host_ms(call, batch)

    return clock


def _measure_pass(session, suite, name, config, pass_, operands, checked, calls):
    (params, x), (expected, touched) = operands, checked
    errors = {}
    for impl, call in calls.items():
        out = call.run()
        y = out[0] if isinstance(out, tuple) else out
        errors[impl] = relative_error(y.reshape(x.shape)[:CHECKED_TOKENS], expected)
        del out, y
    # A backward pass needs twice the operations, reads each weight again and writes its gradient.
    times = 3 if pass_ == "forward_backward" else 1
    experts = sum(leaf.nbytes for leaf in params["experts"].values())
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - experts + experts * touched / config.num_experts
    flops = times * x.shape[0] * matmul_flops_per_token(config)
    floor = session.floor_ms(flops, times * weights)
    for impl, ms in time_in_turn(calls, 20 if suite == "decode" else 3, session.rounds, _clock(calls)).items():
        temp = calls[impl].temp_bytes
        session.record(Row(suite, name, pass_, impl, ms, flops / ms / 1e9, floor, errors[impl], temp))
