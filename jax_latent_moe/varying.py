"""Types of values inside of a user's own `shard_map`: each says over which mapped axes its value varies."""

from typing import Any

import jax
from jax import lax
from jaxtyping import PyTree


def varying(values: Any, *like: PyTree) -> Any:
    """Types the values as varying over every mapped axis that any array of `like` varies over.

    The carry of a scan must keep its type, and a gradient must have the type of its value.
    """
    axes = frozenset().union(*map(_varying_axes, jax.tree.leaves(like)))

    def cast(value):
        missing = tuple(axes - _varying_axes(value))
        return lax.pcast(value, missing, to="varying") if missing else value

    return jax.tree.map(cast, values) if axes else values


def _varying_axes(array) -> frozenset:
    kind = jax.typeof(array)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma  # from JAX 0.12 on, and before
