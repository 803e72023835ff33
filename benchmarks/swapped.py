"""A layer in plain JAX, on `jax.lax.ragged_dot` and on this library's: the suite "ragged_dot" of `benchmarks.gpu`.

The two programs differ in one import. Where JAX has no kernel, its product expands the rows over all experts, so the
suite has a size that fits a GPU's memory besides the size of the other suites.
"""

import functools

import jax

from benchmarks import layers
from benchmarks.measure import Session
from benchmarks.peers import jax_layer
from benchmarks.problems import SUPER
from jax_latent_moe import LatentMoEConfig, ragged_dot
from jax_latent_moe.grouped_matmul.tuning.timing import Candidate, jax_candidate

SHAPES = {"super_t8192": (8192, SUPER), "super_t512": (512, SUPER)}


def candidates(config: LatentMoEConfig, pass_: str, params, x, dy, *, session: Session) -> dict[str, Candidate]:
    """The plain layer with each function, and `latent_moe`."""
    del session
    plain = {
        "jax_lax_ragged_dot": jax.lax.ragged_dot,
        "jax_latent_moe_ragged_dot": functools.partial(ragged_dot, backend=config.backend),
    }
    made = {name: lambda params, x, dot=dot: jax_layer.layer(params, x, config, dot) for name, dot in plain.items()} | {
        "latent_moe": functools.partial(layers.our_layer, config)
    }
    if pass_ == "forward":
        return {name: jax_candidate(layer, params, x) for name, layer in made.items()}
    return {name: jax_candidate(layers.with_gradients(layer), params, x, dy) for name, layer in made.items()}


measure = functools.partial(layers.measure, candidates=candidates)
