"""A layer for few tokens in a compiled loop, as generation runs it: the suite "loop" of `benchmarks.gpu`.

Each step has other tokens, which depend on the output of the last step. A row's time is for one step. "decode" is
`CutlassBackend(decode="always")`, "usual" the grouped matmuls, and "loop_alone" the same loop without the layer. The
floor is the time to read the weights of the experts that the tokens choose, and all others, once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from benchmarks import kernel_table, timeline
from benchmarks.layers import reference
from benchmarks.matmuls import relative_error
from benchmarks.measure import Row, Session
from benchmarks.problems import SUPER
from jax_latent_moe import CutlassBackend, LatentMoEConfig, PallasBackend, init_params, latent_moe, quantize
from jax_latent_moe.cost import matmul_flops_per_token
from jax_latent_moe.decode import Decode, plan_decode
from jax_latent_moe.experts import flat
from jax_latent_moe.formats import ScaledArray
from jax_latent_moe.grouped_matmul.tuning.timing import jax_candidate, prepare, time_in_turn

STEPS = 64
SHAPES = {
    f"super_t{tokens}_{format}": (tokens, None if format == "bf16" else format)
    for format in ("bf16", "fp8_block", "mxfp4")
    for tokens in (1, 8, 16, 64)
}
QUICK_SHAPES = ("super_t1_bf16", "super_t1_fp8_block", "super_t1_mxfp4")


def layer_loop(config: LatentMoEConfig | None, params, tokens):
    """The outputs of the last step, for tokens [steps, T, d]. Without a config, the loop without a layer."""

    def step(i, y):
        x = tokens[i] + y * jnp.asarray(1e-3, y.dtype)
        return -x if config is None else latent_moe(params, x, config)[0]

    return jax.lax.fori_loop(0, tokens.shape[0], step, jnp.zeros_like(tokens[0]))


def chosen_experts(config: LatentMoEConfig, params, tokens) -> float:
    """The mean number of experts that a step's tokens choose."""

    def count(_, x):
        return None, jnp.sum(latent_moe(params, x, config)[1].tokens_per_expert > 0)

    return float(jnp.mean(jax.jit(lambda params, tokens: jax.lax.scan(count, None, tokens)[1])(params, tokens)))


def measure(session: Session, suite: str, shapes: dict[str, tuple[int, str | None]]) -> None:
    """One row per shape and implementation, and a table of the kernels of a step."""
    dense = None
    params, stored = None, "nothing"
    for name, (tokens, format) in shapes.items():
        if dense is None:
            dense = jax.jit(init_params, static_argnums=1)(jax.random.key(0), SUPER)
        if format != stored:
            params = None  # frees the last one's memory
            params, stored = dense if format is None else _quantized(dense, format), format
        shape = (STEPS, tokens, SUPER.hidden_size)
        _measure(session, suite, name, params, jax.random.normal(jax.random.key(1), shape, jnp.bfloat16))


@functools.partial(jax.jit, static_argnums=1)
def _quantized(params, format):
    return quantize(params, SUPER, format)


def _measure(session, suite, name, params, inputs):
    tokens = inputs.shape[1]
    # The first backends of `auto` behind the kernels for few tokens.
    is_coded = isinstance(params["experts"]["w_in"], ScaledArray)
    usual = dataclasses.replace(SUPER, backend=PallasBackend() if is_coded else CutlassBackend(decode="never"))
    configs: dict[str, LatentMoEConfig | None] = {"usual": usual, "loop_alone": None}
    always = dataclasses.replace(SUPER, backend=CutlassBackend(decode="always"))
    experts = (flat(params["experts"][name]) for name in ("w_in", "w_out"))
    if isinstance(plan_decode(always, tokens, SUPER.top_k, inputs.dtype, *experts), Decode):
        configs["decode"] = always
    found = {
        impl: jax_candidate(functools.partial(layer_loop, config), params, inputs) for impl, config in configs.items()
    }
    calls = prepare(session.wanted(found))
    expected, _ = reference(SUPER, params, inputs[0])
    experts = sum(leaf.nbytes for leaf in jax.tree.leaves(params["experts"]))
    share = chosen_experts(usual, params, inputs) / SUPER.num_experts
    others = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - experts
    flops = tokens * matmul_flops_per_token(SUPER)
    floor = session.floor_ms(flops, others + experts * share)
    for impl, ms in time_in_turn(calls, 4, session.rounds).items():
        ms /= STEPS
        config, error = configs[impl], None
        if config is not None:
            y = jax.jit(latent_moe, static_argnums=2)(params, inputs[0], config)[0]
            error = relative_error(y, expected)
        session.record(Row(suite, name, "step", impl, ms, flops / ms / 1e9, floor, error, calls[impl].temp_bytes))
        trace = kernel_table.trace_of(lambda call=calls[impl]: call.wait(call.run()))
        print(f"{'kernels':>10} of a step, {impl}\n{kernel_table.table(kernel_table.kernels(trace, STEPS), 16)}")
        print(timeline.table(timeline.timeline(trace, STEPS)), flush=True)
