"""Types of values inside of a user's own `shard_map`: each says over which mapped axes its value varies."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree


def varying(values: Any, *like: PyTree) -> Any:
    """Types the values as varying over every mapped axis that any array of `like` varies over.

    The carry of a scan must keep its type, and a gradient must have the type of its value.
    """
    axes = frozenset().union(*map(_varying_axes, jax.tree.leaves(like)))
    return jax.tree.map(lambda value: _cast(value, axes), values) if axes else values


def zeros_of(kind: Any) -> Any:
    """Zeros of a type, as `jax.typeof` gives it for an array."""
    return _cast(jnp.zeros(kind.shape, kind.dtype), _axes_of(kind))


def _cast(value, axes):
    missing = tuple(axes - _varying_axes(value))
    return lax.pcast(value, missing, to="varying") if missing else value


def _varying_axes(array) -> frozenset:
    return _axes_of(jax.typeof(array))


def _axes_of(kind) -> frozenset:
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma  # from JAX 0.12 on, and before
