"""A step of fine-tuning with adapters beside the same layer frozen: the suite "lora" of `benchmarks.gpu`.

"<format> frozen" is the layer's output and the gradient of its input, which a frozen layer inside of a model needs.
"<format> lora" also has the gradients of low-rank adapters on the experts and on both projections. The floor is that of
the frozen layer in bfloat16: two passes over each weight, and twice the operations of a forward pass.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks import kernel_table
from benchmarks.layers import our_layer
from benchmarks.measure import Row, Session
from benchmarks.problems import SUPER
from jax_latent_moe import LatentMoEConfig, init_params, lora, merge_state, quantize
from jax_latent_moe.cost import matmul_flops_per_token
from jax_latent_moe.grouped_matmul.tuning.timing import Candidate, jax_candidate, prepare, time_in_turn

FORMATS = (None, "mxfp4", "nvfp4")
QUICK_FORMATS = (None, "mxfp4")
SHAPES = {f"super_t{tokens}": (tokens, SUPER) for tokens in (1024, 4096, 8192)}
QUICK_SHAPES = ("super_t4096",)
RANK = 16
TRACED = 4
"""Calls in a trace."""


def frozen_step(config: LatentMoEConfig, params, x, dy):
    """The layer's output and the gradient of x."""
    return _both_passes(lambda x: our_layer(config, params, x), dy, x)


def adapted_step(config: LatentMoEConfig, adapters, rest, x, dy):
    """The layer's output, and the gradients of the adapters and of x."""
    return _both_passes(lambda adapters, x: our_layer(config, merge_state(adapters, rest), x), dy, adapters, x)


def _both_passes(layer, dy, *args):
    y, pullback = jax.vjp(layer, *args)
    # Inside of a model, the gradient depends on the output. Without the barrier, XLA would mix both passes.
    y, dy = jax.lax.optimization_barrier((y, dy))
    return y, *pullback(dy)


def candidates(config: LatentMoEConfig, params, x, dy, formats) -> dict[str, Candidate]:
    """Both steps with experts in each format, or dense."""
    found = {}
    for format in formats:
        base = params if format is None else jax.jit(quantize, static_argnums=(1, 2))(params, config, format)
        adapters, rest = lora.split(lora.adapt(jax.random.key(3), base, config, rank=RANK))
        name = format or config.dtype
        found[f"{name} frozen"] = jax_candidate(functools.partial(frozen_step, config), base, x, dy)
        found[f"{name} lora"] = jax_candidate(functools.partial(adapted_step, config), adapters, rest, x, dy)
    return found


def measure(session: Session, suite: str, shapes: dict[str, tuple[int, LatentMoEConfig]]) -> None:
    """One row per layer, format and step, and the kernels of each."""
    for name, (tokens, config) in shapes.items():
        params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
        x, dy = (jax.random.normal(jax.random.key(i), (tokens, config.hidden_size), jnp.bfloat16) for i in (1, 2))
        found = candidates(config, params, x, dy, QUICK_FORMATS if session.quick else FORMATS)
        calls = prepare(session.wanted(found))
        flops = 2 * tokens * matmul_flops_per_token(config)
        floor = session.floor_ms(flops, 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
        for impl, ms in time_in_turn(calls, 3, session.rounds).items():
            temp = calls[impl].temp_bytes
            session.record(Row(suite, name, "forward_backward", impl, ms, flops / ms / 1e9, floor, None, temp))
        for impl, call in calls.items():
            table = kernel_table.table(kernel_table.kernels(kernel_table.trace_of_calls(call, TRACED), TRACED), 12)
            print(f"{'kernels':>10} of {impl}\n{table}", flush=True)
