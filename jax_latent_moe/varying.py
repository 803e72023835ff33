"""Types of values in a `shard_map` of the user's own, which say over which mapped axes a value varies."""

from typing import Any

import jax
from jax import lax
from jaxtyping import PyTree


def varying(values: Any, *like: PyTree) -> Any:
    """The values, typed to vary over every mapped axis that any array of `like` varies over.

    A scan's carry must not change its type, nor may a gradient that a rule of ours makes differ from its value's.
    """
    axes = frozenset().union(*map(_varying_axes, jax.tree.leaves(like)))

    def cast(value):
        missing = tuple(axes - _varying_axes(value))
        return lax.pcast(value, missing, to="varying") if missing else value

    return jax.tree.map(cast, values) if axes else values


def _varying_axes(array) -> frozenset:
    kind = jax.typeof(array)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma  # from JAX 0.12 on, and before
