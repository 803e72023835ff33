"""`LowRank`: a frozen weight with a low-rank adapter, which takes the weight's place in the parameter tree.

LoRA (Hu et al., arXiv 2106.09685): the weight is base + scale * a b, and only a and b are trained.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jax_latent_moe.formats import ScaledArray, map_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The weight base + scale * a b. It is a pytree; parts that are split off are None.

    Attributes:
        base: [..., K, N] or [..., K, 2, N], frozen: an array or a `ScaledArray`.
        a: [..., K, r].
        b: [..., r, N] or [..., r, 2, N], as the dense weight.
        scale: alpha / r.
    """

    base: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def adapter(self) -> "LowRank":
        """The part that is trained, without the base."""
        return dataclasses.replace(self, base=None)

    @property
    def frozen(self) -> "LowRank":
        """Only the base."""
        return dataclasses.replace(self, a=None, b=None)

    def with_base(self, base: Any) -> "LowRank":
        """The same adapter on another base, such as one that was split off."""
        return dataclasses.replace(self, base=base)


def base_of(weight: Any) -> Any:
    """The weight without its adapter, if it has one."""
    return weight.base if isinstance(weight, LowRank) else weight


def projected(x: Float[Array, "t k"], weight: LowRank) -> Float[Array, "t n"]:
    """The term that the adapter adds to x @ base, in the dtype of x."""
    return (x @ weight.a.astype(x.dtype)) @ weight.b.astype(x.dtype) * jnp.asarray(weight.scale, x.dtype)


def cast(weight: Any, dtype) -> Any:
    """A weight in the dtype that products compute with: codes stay codes, and a base under an adapter is frozen."""
    if isinstance(weight, LowRank):
        return LowRank(
            lax.stop_gradient(cast(weight.base, dtype)), weight.a.astype(dtype), weight.b.astype(dtype), weight.scale
        )
    return weight if isinstance(weight, ScaledArray) else weight.astype(dtype)


def map_leaf_axes(weight: Any, axes: Sequence[Any], make: Callable[..., Any], *, stacked: bool) -> Any:
    """The results of make for each array of a weight, whether it has codes, an adapter, both or neither.

    Args:
        weight: an array, a `ScaledArray` or a `LowRank` of either.
        axes: one for each axis of the dense weight, such as the mesh axis that splits it.
        make: called with the axes of each array.
        stacked: whether the first axis counts experts.
    """
    if isinstance(weight, ScaledArray):
        return map_axes(weight, axes, make)
    if not isinstance(weight, LowRank):
        return None if weight is None else make(*axes)
    leading, k, trailing = axes[:stacked], axes[stacked], axes[stacked + 1 :]
    base = map_leaf_axes(weight.base, axes, make, stacked=stacked)
    a = None if weight.a is None else make(*leading, k, None)
    b = None if weight.b is None else make(*leading, None, *trailing)
    return LowRank(base, a, b, weight.scale)
