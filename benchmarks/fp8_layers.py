"""Layers whose experts multiply in FP8, and what their encoders cost: the suite "fp8_layer" of `benchmarks.gpu`.

"forward" and "forward_backward" are those of the suite "layer", with the floor of bfloat16. "fp8" encodes the weights
in the call, and "fp8_codes" reads codes that were made beforehand. "fp8_codes_fused" also has all activations and
gradients in its products. The kernels of each implementation and the times between them follow. "gradient" is the
gradient of the pre-activations with its codes, by the kernels' times in a trace (benchmarks/fp8_gradient.py).
"encode_weights" makes the codes of both float32 weights in both layouts. "encode_rows" makes those of the hidden rows.
"""

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks import fp8_gradient, kernel_table, layers
from benchmarks.measure import Row, Session
from benchmarks.problems import SUPER
from jax_latent_moe import (
    CutlassBackend,
    LatentMoEConfig,
    Precision,
    XlaBackend,
    encode_experts,
    init_params,
    latent_moe,
)
from jax_latent_moe.device import current_device
from jax_latent_moe.formats import encode_rows
from jax_latent_moe.grouped_matmul.tuning.timing import (
    Call,
    Candidate,
    jax_candidate,
    prepare,
    time_in_turn,
)
from jax_latent_moe.routing.compiled import compiled_runs
from jax_latent_moe.row_encoders import row_encoder

FORMAT = "fp8_block"
SHAPES = {"super_t8192": (8192, SUPER), "super_t2048": (2048, SUPER)}
QUICK_SHAPES = ("super_t8192",)
TRACED = 4
"""Calls in a trace."""


def in_fp8(config: LatentMoEConfig) -> LatentMoEConfig:
    """The layer with both forward products and both input gradients in FP8."""
    return dataclasses.replace(config, precision=Precision(FORMAT, FORMAT))


def encode_both(config: LatentMoEConfig, params):
    """The codes of both weights in both layouts. `params` may hold only the experts."""
    return encode_experts(params, in_fp8(config))


def candidates(config: LatentMoEConfig, pass_: str, params, x, dy, *, session: Session) -> dict[str, Candidate]:
    """The layer in bfloat16 and in FP8, without and with codes made beforehand, and with all in the products."""
    del session
    codes = jax.jit(encode_both, static_argnums=0)(config, params)
    forward = pass_ == "forward"

    def candidate(config, codes):
        def layer(params, x, codes):
            return latent_moe(params, x, config, codes=codes)[0]

        def both(params, x, dy, codes):
            return layers.with_gradients(lambda params, x: layer(params, x, codes))(params, x, dy)

        return jax_candidate(layer, params, x, codes) if forward else jax_candidate(both, params, x, dy, codes)

    found = {
        "bfloat16": candidate(config, None),
        "fp8": candidate(in_fp8(config), None),
        "fp8_codes": candidate(in_fp8(config), codes),
    }
    if not forward and compiled_runs(config.backend):
        fused = dataclasses.replace(in_fp8(config), backend=CutlassBackend(fuse="always"))
        found["fp8_codes_fused"] = candidate(fused, codes)
    return found


def print_kernels(session: Session, suite: str, shape: str, pass_: str, calls: dict[str, Call]) -> None:
    """On a GPU, the kernels of forward and backward and the times between them."""
    del session, suite, shape
    for impl, call in calls.items() if pass_ == "forward_backward" else ():
        if call.queue is not None:
            data = kernel_table.trace_of_calls(call, TRACED)
            print(f"{'kernels':>10} of {pass_}, {impl}\n{kernel_table.table(kernel_table.kernels(data, TRACED), 16)}")
            print(kernel_table.table_of_waits(kernel_table.waits(data, TRACED), 6), flush=True)


def measure(session: Session, suite: str, shapes: dict[str, tuple[int, LatentMoEConfig]]) -> None:
    """One row per layer, pass and implementation. An encoder that does not run here is left out."""
    layers.measure(session, suite, shapes, candidates, print_kernels)
    for name, (tokens, config) in shapes.items():
        fp8_gradient.measure(session, suite, name, tokens, config)
        masters = dataclasses.replace(config, param_dtype="float32")
        experts = jax.jit(lambda c=masters: init_params(jax.random.key(0), c)["experts"])()
        by_name = {"xla": dataclasses.replace(config, backend=XlaBackend())}
        by_name |= {"cutlass": config} if compiled_runs(config.backend) else {}
        found = {
            impl: jax_candidate(lambda experts, c=c: encode_both(c, {"experts": experts}), experts)
            for impl, c in by_name.items()
        }
        weights = sum(leaf.size for leaf in experts.values())
        _time(session, suite, name, "encode_weights", found, 6 * weights)
        del experts, found
        rows, width = tokens * config.top_k, config.expert_intermediate_size
        hidden = jax.jit(jax.random.normal, static_argnums=(1, 2))(jax.random.key(0), (rows, width), jnp.bfloat16)
        encoder = row_encoder(FORMAT, config.backend, width, hidden.dtype, current_device())
        assert encoder is not None
        found = {"xla": jax_candidate(lambda rows: encode_rows(rows, FORMAT), hidden)}
        found |= {"cutlass": jax_candidate(encoder, hidden)} if encoder.refusal is None else {}
        _time(session, suite, name, "encode_rows", found, 3 * hidden.size + 4 * hidden.size // 128)


def _time(session, suite, shape, pass_, found: dict[str, Candidate], traffic: int):
    calls = prepare(session.wanted(found))
    floor = session.floor_ms(0, traffic)
    for impl, ms in time_in_turn(calls, 12, session.rounds).items():
        session.record(Row(suite, shape, pass_, impl, ms, 0.0, floor, None, calls[impl].temp_bytes))
