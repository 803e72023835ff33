"""The router's logits from bfloat16 tokens and a float32 kernel: the suite "logits" of `benchmarks.gpu`.

`split_matmul` beside the algorithms of `jax.lax.DotAlgorithmPreset` that are about as exact, and beside XLA's float32
matmul. The error is of the logits against float64. The backward pass is from a float32 gradient of the logits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import DotAlgorithmPreset

from benchmarks.matmuls import relative_error
from benchmarks.measure import Row, Session
from jax_latent_moe.grouped_matmul.tuning.timing import jax_candidate, prepare, time_in_turn
from jax_latent_moe.routing.split_matmul import split_matmul


@dataclasses.dataclass(frozen=True)
class Logits:
    """T tokens of width d, and E experts."""

    tokens: int
    hidden_size: int
    num_experts: int


SHAPES = {
    "super_t8192": Logits(8192, 4096, 512),
    "qwen3_t8192": Logits(8192, 2048, 128),
    "middle_t8192": Logits(8192, 1024, 64),
}
PRESETS = ("BF16_BF16_F32_X3", "BF16_BF16_F32_X6", "BF16_BF16_F32_X9", "TF32_TF32_F32_X3", "F32_F32_F32")


def by_preset(preset: str, x, kernel):
    """The product of float32 operands by an algorithm of XLA."""
    algorithm = getattr(DotAlgorithmPreset, preset)
    return jnp.matmul(x.astype(jnp.float32), kernel, precision=algorithm, preferred_element_type=jnp.float32)


IMPLEMENTATIONS = {"split_matmul": split_matmul} | {name: functools.partial(by_preset, name) for name in PRESETS}


def both(product, x, kernel, dlogits):
    """The logits, and the gradients of x and the kernel."""
    logits, pullback = jax.vjp(product, x, kernel)
    return logits, pullback(dlogits)


def measure(session: Session, suite: str, shapes: dict[str, Logits]) -> None:
    """One row per shape, pass and implementation. An algorithm that XLA lacks on this device is left out."""
    for name, shape in shapes.items():
        rng = np.random.default_rng(0)
        x, kernel, dlogits = (
            jnp.asarray(rng.standard_normal(size), dtype)
            for size, dtype in (
                ((shape.tokens, shape.hidden_size), "bfloat16"),
                ((shape.hidden_size, shape.num_experts), "float32"),
                ((shape.tokens, shape.num_experts), "float32"),
            )
        )
        exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
        for pass_, matmuls, function, arguments in (
            ("forward", 1, lambda product, *args: product(*args), (x, kernel)),
            ("forward_backward", 3, both, (x, kernel, dlogits)),
        ):
            found = {
                impl: jax_candidate(functools.partial(function, product), *arguments)
                for impl, product in session.wanted(IMPLEMENTATIONS).items()
            }
            calls = prepare(found)
            flops = 2 * matmuls * x.size * shape.num_experts
            traffic = matmuls * (x.nbytes + kernel.nbytes + dlogits.nbytes)
            for impl, ms in time_in_turn(calls, 20, session.rounds).items():
                error = None
                if pass_ == "forward":
                    error = relative_error(jax.jit(IMPLEMENTATIONS[impl])(x, kernel), exact)
                floor = session.floor_ms(flops, traffic)
                session.record(
                    Row(suite, name, pass_, impl, ms, flops / ms / 1e9, floor, error, calls[impl].temp_bytes)
                )
