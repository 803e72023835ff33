"""The mesh axes that split a layer, and the sums and gathers over them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Shards:
    """The mesh axes that split a part of the layer. Without axes, every method returns its argument.

    Attributes:
        token_axes: the axes that split the tokens.
        sequences_split: whether they split within sequences, instead of between them.
        expert_axis: the axis that splits the experts.
        tensor_axis: the axis that splits the inner widths.
    """

    token_axes: tuple[str, ...] = ()
    sequences_split: bool = False
    expert_axis: str | None = None
    tensor_axis: str | None = None

    def sum_over_tokens(self, values: Array) -> Array:
        """The sum over the devices that hold different tokens."""
        return lax.psum(values, self.token_axes) if self.token_axes else values

    def gather_tokens(self, values: Array) -> Array:
        """The values of all devices' tokens, [T, ...] -> [T_all, ...], in the order of x."""
        return lax.all_gather(values, self.token_axes, tiled=True) if self.token_axes else values

    def own_tokens(self, values: Array) -> Array:
        """This device's part of the result of `gather_tokens`."""
        if not self.token_axes:
            return values
        mine = values.shape[0] // lax.axis_size(self.token_axes)
        return lax.dynamic_slice_in_dim(values, lax.axis_index(self.token_axes) * mine, mine)

    def token_index(self) -> int | Array:
        """The index of this device among the devices that hold different tokens."""
        return lax.axis_index(self.token_axes) if self.token_axes else 0

    def sum_over_tensor(self, values: Array) -> Array:
        """The sum of the partial sums over the inner widths. All devices must use the result in the same way."""
        return sum_used_alike(self.tensor_axis, values) if self.tensor_axis else values

    def once_over_tensor(self, values: Array) -> Array:
        """The values on the first device along the tensor axis and zeros on the others: a sum then has them once."""
        if self.tensor_axis is None:
            return values
        return jnp.where(lax.axis_index(self.tensor_axis) == 0, values, 0)


ONE_DEVICE = Shards()
"""The shards of a layer that is not split."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_used_alike(axis, values):
    """A psum whose result all devices use in the same way. The cotangents are then equal, and need no psum."""
    return lax.psum(values, axis)


def _sum_used_alike_fwd(axis, values):
    return sum_used_alike(axis, values), None


def _sum_used_alike_bwd(axis, _, cotangent):
    # Each device has an equal share of the whole cotangent.
    return (cotangent * lax.axis_size(axis),)


sum_used_alike.defvjp(_sum_used_alike_fwd, _sum_used_alike_bwd)
