"""Layers of many tokens with experts in codes, as a prompt is read: the suite "prefill" of `benchmarks.gpu`.

"bfloat16" is the layer with dense experts. A format's name is the layer with experts in that format, as `auto` runs it,
and "<format> pallas" has the products of the Pallas kernels. The errors are those against dense experts, so they are
mostly those of the format. The floor is that of bfloat16. Tokens and parameters are random, so experts are about evenly
loaded.
"""

import dataclasses
import functools

import jax

from benchmarks import kernel_table
from benchmarks.layers import measure as measure_layers
from benchmarks.layers import our_layer
from benchmarks.measure import Session
from benchmarks.problems import SUPER
from jax_latent_moe import LatentMoEConfig, PallasBackend, quantize
from jax_latent_moe.grouped_matmul.tuning.timing import Call, Candidate, jax_candidate

FORMATS = ("mxfp4", "nvfp4", "int4_128", "int8", "fp8_block")
QUICK_FORMATS = ("mxfp4", "nvfp4")
SHAPES = {f"super_t{tokens}": (tokens, SUPER) for tokens in (1024, 2048, 4096, 8192)}
QUICK_SHAPES = ("super_t4096",)
TRACED = 4
"""Calls in a trace."""


def candidates(config: LatentMoEConfig, pass_: str, params, x, dy, *, session: Session) -> dict[str, Candidate]:
    """The layer with dense experts, and with experts in each format on two backends."""
    del pass_, dy
    found = {"bfloat16": jax_candidate(functools.partial(our_layer, config), params, x)}
    pallas = dataclasses.replace(config, backend=PallasBackend())
    for format in QUICK_FORMATS if session.quick else FORMATS:
        coded = jax.jit(quantize, static_argnums=(1, 2))(params, config, format)
        for name, own in ((format, config), (f"{format} pallas", pallas)):
            found[name] = jax_candidate(functools.partial(our_layer, own), coded, x)
    return found


def print_kernels(session: Session, suite: str, shape: str, pass_: str, calls: dict[str, Call]) -> None:
    """The kernels of each implementation."""
    del session, suite, shape
    for impl, call in calls.items():
        data = kernel_table.trace_of_calls(call, TRACED)
        table = kernel_table.table(kernel_table.kernels(data, TRACED), 12)
        print(f"{'kernels':>10} of {pass_}, {impl}\n{table}", flush=True)


def measure(session: Session, suite: str, shapes: dict[str, tuple[int, LatentMoEConfig]]) -> None:
    """One row per layer and implementation, of the forward pass alone."""
    measure_layers(session, suite, shapes, candidates, print_kernels)
