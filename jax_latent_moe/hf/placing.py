"""Moves an imported parameter to its devices: whole to a CPU, which keeps the host's buffer, and else in parts."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding, SingleDeviceSharding

PART = 2**23
"""Bytes of experts that are moved at once, or 1/128 of the parameter's if that is more."""
_ALIGNMENT = 64  # bytes; a CPU device takes over a buffer with this alignment without a copy

Index = tuple[slice, ...]
Fill = Callable[[np.ndarray, Index], None]


class OnDevice(NamedTuple):
    """What is left to do with experts' values once they are on an accelerator, which is faster at it than the host.

    Attributes:
        fill: as the argument of `place`, but it writes unfinished values.
        finish: makes of unfinished values those of the array.
        multiple: a part of the last axis can be finished by itself if it begins and ends at multiples of this, or at
            the end of the axis.
    """

    fill: Fill
    finish: Callable[[jax.Array], jax.Array]
    multiple: int

    def takes(self, part: range, size: int) -> bool:
        """Whether a part of a last axis of that size can be finished."""
        return part.start % self.multiple == 0 and (part.stop % self.multiple == 0 or part.stop == size)


def place(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding | None,
    fill: Fill,
    *,
    experts: bool,
    on_device: OnDevice | None = None,
) -> jax.Array:
    """An array on its devices, assembled in host memory.

    Args:
        shape: of the whole array.
        dtype: of the array.
        sharding: None for JAX's default device.
        fill: called with an empty array and the index of its elements in the whole; it writes them.
        experts: whether the first axis is the experts. Such an array is moved in parts, so that the host never holds
            much of it.
        on_device: if given, parts that are moved to an accelerator are finished there.
    """
    where = SingleDeviceSharding(jax.devices()[0]) if sharding is None else sharding

    def assembled(index: Any, fill: Fill = fill) -> np.ndarray:
        array = _aligned_empty([len(each) for each in _ranges(index, shape)], dtype)
        fill(array, index)
        return array

    if experts and _has_own_memory(where):
        return _in_parts(shape, dtype, where, assembled, on_device)
    if isinstance(where, SingleDeviceSharding):
        # This is the only reference to the buffer, so a CPU device may keep it instead of a copy.
        return jax.block_until_ready(jax.device_put(assembled((slice(None),) * len(shape)), where, may_alias=True))
    return jax.block_until_ready(jax.make_array_from_callback(shape, where, assembled))


def _has_own_memory(sharding: Sharding) -> bool:
    """Whether the shards lie in the memory of accelerators, not in the host's."""
    return all(
        device.platform != "cpu" and sharding.memory_kind in (None, device.default_memory().kind)
        for device in sharding.device_set
    )


def _ranges(index: Any, shape: tuple[int, ...]) -> list[range]:
    return [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]


def _in_parts(shape, dtype, sharding: Sharding, assembled: Callable, on_device: OnDevice | None) -> jax.Array:
    """The array, each shard written part by part. Equal shards are read once and copied between the devices."""
    shards, found = [], {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        ranges = _ranges(index, shape)
        key = tuple((each.start, each.stop) for each in ranges)
        if key not in found:
            read, finish = assembled, None
            if on_device is not None and on_device.takes(ranges[-1], shape[-1]):
                read, finish = functools.partial(assembled, fill=on_device.fill), on_device.finish
            found[key] = _shard(ranges, dtype, device, read, finish)
        shards.append(jax.device_put(found[key], device))
    whole = jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=dtype)
    return jax.block_until_ready(whole)


def _shard(ranges: list[range], dtype, device, assembled: Callable[[Index], np.ndarray], finish) -> jax.Array:
    experts, *others = ranges
    rest = tuple(slice(each.start, each.stop) for each in others)
    shard, moving = jnp.zeros([len(each) for each in ranges], dtype, device=device), None
    for chosen in _parts(experts, shard.nbytes):
        part = assembled((slice(chosen.start, chosen.stop), *rest))
        jax.block_until_ready(moving)  # The host holds two parts at most: the next is read while one is moved.
        moving, first = jax.device_put((part, np.int32(chosen.start - experts.start)), device)
        shard = _write(finish, shard, moving, first)
    return jax.block_until_ready(shard)


def _parts(experts: range, nbytes: int) -> Iterator[range]:
    """The experts of each part."""
    at_once = max(1, max(PART, nbytes // 128) * len(experts) // max(1, nbytes))
    return (experts[first : first + at_once] for first in range(0, len(experts), at_once))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _write(finish, shard: jax.Array, part: jax.Array, first: jax.Array) -> jax.Array:
    """Writes a part into the shard, in its own memory."""
    part = part if finish is None else finish(part)
    return lax.dynamic_update_slice_in_dim(shard, part, first, 0)


def _aligned_empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)
