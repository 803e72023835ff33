"""The shared expert in compiled kernels and by XLA: the suite "shared" of `benchmarks.gpu`.

"fused" runs the two products beside the activation as grouped matmuls of one group, with the activation and its
gradient in their epilogues. "xla" multiplies with cuBLAS and passes over the hidden rows for the activation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from benchmarks.layers import with_gradients
from benchmarks.matmuls import relative_error
from benchmarks.measure import Row, Session
from benchmarks.problems import SUPER
from jax_latent_moe import CutlassBackend, LatentMoEConfig, init_params
from jax_latent_moe.grouped_matmul.tuning.timing import jax_candidate, prepare, time_in_turn
from jax_latent_moe.shared_expert import shared_expert


def _layer(hidden_size: int, inner: int, activation: str = "relu2") -> LatentMoEConfig:
    sizes = dict(hidden_size=hidden_size, latent_size=8, num_experts=2, top_k=2, expert_intermediate_size=8)
    shared = dict(shared_expert_intermediate_size=inner, activation=activation, param_dtype="bfloat16")
    return dataclasses.replace(SUPER, **sizes, **shared)


SHAPES = {
    "d512_ms512_t16384": (16384, _layer(512, 512)),
    "d1024_ms1024_t32768": (32768, _layer(1024, 1024)),
    "d1024_ms2048_t32768": (32768, _layer(1024, 2048)),
    "d2048_ms2048_t16384": (16384, _layer(2048, 2048)),
    "d2048_ms2048_t16384_swiglu": (16384, _layer(2048, 2048, "swiglu")),
    "d4096_ms5376_t8192": (8192, _layer(4096, 5376)),
}
QUICK_SHAPES = ("d1024_ms1024_t32768",)
WAYS = {"xla": CutlassBackend(fuse="never"), "fused": CutlassBackend()}


def _shared(config, params, x):
    return shared_expert(x, params, config)


def measure(session: Session, suite: str, shapes: dict[str, tuple[int, LatentMoEConfig]]) -> None:
    """One row per shape, pass and way. Errors are relative to the first way."""
    for name, (tokens, config) in shapes.items():
        params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)["shared"]
        size = tokens, config.hidden_size
        x, dout = (jax.random.normal(jax.random.key(i), size, jnp.bfloat16) for i in (1, 2))
        flops = 2 * tokens * sum(leaf.size for leaf in params.values())
        for pass_, share in (("forward", 1), ("forward_backward", 3)):
            found = {}
            for way, backend in WAYS.items():
                layer = functools.partial(_shared, dataclasses.replace(config, backend=backend))
                operands = (params, x) if pass_ == "forward" else (params, x, dout)
                found[way] = jax_candidate(layer if pass_ == "forward" else with_gradients(layer), *operands)
            calls = prepare(session.wanted(found))
            outs = {way: jax.tree.leaves(call.wait(call.run()))[0] for way, call in calls.items()}
            first = next(iter(outs.values()))
            for way, ms in time_in_turn(calls, 8, session.rounds).items():
                rate, floor = share * flops / ms / 1e9, session.floor_ms(share * flops, 0)
                error = relative_error(outs[way], first)
                session.record(Row(suite, name, pass_, way, ms, rate, floor, error, calls[way].temp_bytes))
