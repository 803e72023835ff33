"""The optimiser: adamw or muon, with warm-up, cosine decay and clipping."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree
from optax.contrib import MuonDimensionNumbers, muon

from examples.train.config import OptimizerConfig
from examples.train.placing import is_stacked

# With this root mean square, the updates of muon are as large as those of adamw (Moonlight, arXiv 2502.16982). One
# learning rate then serves both.
MUON_RMS = 0.2


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine down to `final_fraction` of the peak at the last step."""
    warmup = min(config.warmup_steps, steps - 1)
    peak = config.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, peak * config.final_fraction)


def learning_rates(config: OptimizerConfig, steps: int) -> Float[np.ndarray, " steps+1"]:
    """The `learning_rate` of all steps, computed at once so that the training loop needs no device for it."""
    return np.asarray(jax.jit(jax.vmap(learning_rate(config, steps)))(np.arange(steps + 1)))


@functools.cache
def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The transformation: clipping by the global norm, then muon or adamw."""
    schedule = learning_rate(config, steps)
    if config.name == "muon":
        update = muon(
            schedule,
            beta=config.momentum,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=MUON_RMS,
        )
    else:
        update = optax.adamw(schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=is_matrix)
    return optax.chain(clip_by_global_norm(config.clip), update)


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with this module's `global_norm`."""

    def update(updates, state, params=None):
        del params
        norm = global_norm(updates)
        clipped = jax.tree.map(lambda g: jnp.where(norm < largest, g, g / norm.astype(g.dtype) * largest), updates)
        return clipped, state

    return optax.GradientTransformation(optax.init_empty_state, update)


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """The root of the sum of all squares, in float32.

    On a GPU, the squares of a parameter are added elementwise over the blocks and then summed, because one sum for each
    leaf would take one kernel for each. A CPU sums the rows of each leaf first, on all its cores. Leaves of one shape
    but other names may be sharded otherwise, and are not added.
    """
    rows_first = jax.default_backend() == "cpu"
    alike: dict[Any, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        squares = jnp.square(leaf.astype(jnp.float32))
        summed = jnp.sum(squares, axis=-1) if rows_first and leaf.ndim > 1 else squares
        alike.setdefault((path[-2:], leaf.shape), []).append(summed)
    return jnp.sqrt(sum((jnp.sum(functools.reduce(jnp.add, parts)) for parts in alike.values()), jnp.zeros(())))


def is_matrix(params: PyTree) -> PyTree:
    """True for kernels and embeddings. False for the scales of norms, which do not decay."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.ndim - is_stacked(path) > 1, params)


def muon_dimensions(params: PyTree) -> PyTree:
    """The input and output axes of each parameter that muon trains. None leaves a parameter to adamw.

    Every other axis counts separate matrices, and muon orthogonalises each of them separately. These are the experts of
    w_in and w_out, the gate and up kernels of a gated w_in, and the query, key and value kernels of attention.
    """
    return jax.tree_util.tree_map_with_path(_dimensions, params)


def _dimensions(path, leaf):
    names, first = [entry.key for entry in path], int(is_stacked(path))
    if leaf.ndim - first < 2 or {"embed", "head", "router"} & set(names):
        return None
    last = leaf.ndim - 1
    match names[-2:]:
        case ["qkv", "kernel"]:  # [d, 3, heads, width]
            return MuonDimensionNumbers(reduction_axis=first, output_axis=(last - 1, last))
        case ["out", "kernel"]:  # [heads, width, d]
            return MuonDimensionNumbers(reduction_axis=(first, first + 1), output_axis=last)
        case ["experts", _]:  # [E, l, m], [E, l, 2, m], [E, m, l]
            return MuonDimensionNumbers(reduction_axis=first + 1, output_axis=last)
        case _:  # [in, out], gated [in, 2, out]
            return MuonDimensionNumbers(reduction_axis=first, output_axis=last)
