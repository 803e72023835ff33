"""The mesh axes that split a layer, and the sums and gathers over them that one device's part of the layer needs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Shards:
    """The mesh axes that split the layer. Without axes, every method returns its argument.

    Attributes:
        batch_axes: axes that split the sequences from each other.
        sequence_axes: axes that split each sequence into parts.
        sequence_length: tokens of one sequence, or of its part, on this device. It is read only if an axis splits
            tokens.
        expert_axis: axis that splits the experts.
        tensor_axis: axis that splits the inner widths.
    """

    batch_axes: tuple[str, ...] = ()
    sequence_axes: tuple[str, ...] = ()
    sequence_length: int = 1
    expert_axis: str | None = None
    tensor_axis: str | None = None

    @property
    def token_axes(self) -> tuple[str, ...]:
        """All axes that split tokens."""
        return self.batch_axes + self.sequence_axes

    def sum_over_tokens(self, values: Array) -> Array:
        """The sum over all devices that hold other tokens."""
        return _sum(values, self.token_axes)

    def sum_over_batch(self, values: Array) -> Array:
        """The sum over the devices that hold other sequences."""
        return _sum(values, self.batch_axes)

    def sum_over_sequence(self, values: Array) -> Array:
        """The sum over the devices that hold other parts of the same sequences."""
        return _sum(values, self.sequence_axes)

    def gather_sequences(self, values: Array) -> Array:
        """Whole sequences [b, s_all, ...] from this device's parts [b, s, ...]."""
        return _gather(values, self.sequence_axes, axis=1)

    def own_part(self, values: Array) -> Array:
        """This device's part [b, s, ...] of whole sequences [b, s_all, ...]."""
        return _own(values, self.sequence_axes, axis=1)

    def gather_tokens(self, values: Array) -> Array:
        """The tokens [T_all, ...] of all devices, in the order of x, from this device's tokens [T, ...]."""
        if not self.token_axes:
            return values
        whole = self.gather_sequences(values.reshape(-1, self.sequence_length, *values.shape[1:]))
        return _gather(whole, self.batch_axes, axis=0).reshape(-1, *values.shape[1:])

    def own_tokens(self, values: Array) -> Array:
        """This device's tokens [T, ...] from the tokens [T_all, ...] that `gather_tokens` returns."""
        if not self.token_axes:
            return values
        length = self.sequence_length * (lax.axis_size(self.sequence_axes) if self.sequence_axes else 1)
        mine = _own(values.reshape(-1, length, *values.shape[1:]), self.batch_axes, axis=0)
        return self.own_part(mine).reshape(-1, *values.shape[1:])

    def token_index(self) -> int | Array:
        """The index of this device among the devices that hold other tokens."""
        return lax.axis_index(self.token_axes) if self.token_axes else 0

    def sum_over_tensor(self, values: Array) -> Array:
        """The sum over the parts of the inner widths. Each of these devices must use the sum in the same way."""
        return sum_used_alike(self.tensor_axis, values) if self.tensor_axis else values

    def once_over_tensor(self, values: Array) -> Array:
        """The values on one device along the inner widths and zeros on the others, for a sum over these devices."""
        if self.tensor_axis is None:
            return values
        return jnp.where(lax.axis_index(self.tensor_axis) == 0, values, 0)


ONE_DEVICE = Shards()
"""A layer that is not split."""


def _sum(values, axes):
    return lax.psum(values, axes) if axes else values


def _gather(values, axes, axis):
    return lax.all_gather(values, axes, axis=axis, tiled=True) if axes else values


def _own(values, axes, axis):
    if not axes:
        return values
    size = values.shape[axis] // lax.axis_size(axes)
    return lax.dynamic_slice_in_dim(values, lax.axis_index(axes) * size, size, axis=axis)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_used_alike(axis, values):
    """A psum whose result every device uses in the same way. The cotangents are equal, so they need no psum."""
    return lax.psum(values, axis)


def _sum_used_alike_fwd(axis, values):
    return sum_used_alike(axis, values), None


def _sum_used_alike_bwd(axis, _, cotangent):
    # Each device receives 1 / n of the cotangent.
    return (cotangent * lax.axis_size(axis),)


sum_used_alike.defvjp(_sum_used_alike_fwd, _sum_used_alike_bwd)
