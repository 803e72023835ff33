"""What one device's part of the layer knows of the others, and the sums and gathers that make it whole."""

import dataclasses
from functools import partial

import jax
from jax import lax
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Shards:
    """The mesh axes over which a part of the layer is split; without any, every method gives back what it was given.

    Attributes:
        token_axes: axes that split the tokens.
        sequences_split: whether they split within one sequence, and not between sequences.
        expert_axis: axis that splits the experts.
        tensor_axis: axis that splits the inner widths.
    """

    token_axes: tuple[str, ...] = ()
    sequences_split: bool = False
    expert_axis: str | None = None
    tensor_axis: str | None = None

    def sum_over_tokens(self, values: Array) -> Array:
        """The sum over all devices that hold other tokens."""
        return lax.psum(values, self.token_axes) if self.token_axes else values

    def gather_tokens(self, values: Array) -> Array:
        """The tokens [T_all, ...] of every device out of [T, ...], in the order of x."""
        return lax.all_gather(values, self.token_axes, tiled=True) if self.token_axes else values

    def own_tokens(self, values: Array) -> Array:
        """This device's tokens out of those of `gather_tokens`."""
        if not self.token_axes:
            return values
        mine = values.shape[0] // lax.axis_size(self.token_axes)
        return lax.dynamic_slice_in_dim(values, lax.axis_index(self.token_axes) * mine, mine)

    def sum_over_tensor(self, values: Array) -> Array:
        """The sum of what the parts of the inner widths give; everything after it is the same on each of them."""
        return sum_used_alike(self.tensor_axis, values) if self.tensor_axis else values


ONE_DEVICE = Shards()
"""A layer that is not split."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_used_alike(axis, values):
    """A psum whose result each device uses alike, so that its cotangents are equal and need no sum of their own."""
    return lax.psum(values, axis)


def _sum_used_alike_fwd(axis, values):
    return sum_used_alike(axis, values), None


def _sum_used_alike_bwd(axis, _, cotangent):
    # Each device was given its share of the whole cotangent.
    return (cotangent * lax.axis_size(axis),)


sum_used_alike.defvjp(_sum_used_alike_fwd, _sum_used_alike_bwd)
