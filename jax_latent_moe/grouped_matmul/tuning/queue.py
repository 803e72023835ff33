"""The stream of a GPU: work that keeps it busy while the host queues calls, and marks that it stamps with its time.

The host cannot time short kernels. It takes longer to dispatch a call than the kernel runs, and it learns late that the
GPU has reached a mark.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from jax_latent_moe import native

SIZE = 8192
"""Rows and columns of the matmul that is one block of such work. On an H200 it takes 1.4 ms."""


@dataclasses.dataclass(frozen=True)
class Queue:
    """A stream of a GPU, which runs calls in the order in which they are queued.

    Attributes:
        block: queues about a millisecond of work or more.
        block_ms: the least milliseconds of such work.
        mark: queues a mark, and returns it.
        ms_between: waits for the second of two marks, and returns the milliseconds between them on the device.
    """

    block: Callable[[], Any]
    block_ms: float
    mark: Callable[[], Any]
    ms_between: Callable[[Any, Any], float]


def timed_queue(
    block: Callable[[], Any], mark: Callable[[], Any], ms_between: Callable[[Any, Any], float], rounds: int = 5
) -> Queue:
    """A stream whose blocks of work are timed now, a few times."""

    def timed() -> float:
        first = mark()
        block()
        return ms_between(first, mark())

    return Queue(block, min(timed() for _ in range(rounds)), mark, ms_between)


@functools.cache
def jax_queue(device: Any) -> Queue:
    """The stream on which JAX computes on a device. It keeps a matrix of `SIZE` x `SIZE` bfloat16 there.

    The matrix is zero, so that the matmuls draw little power and leave the clocks as they are. A mark is an array. A
    kernel of the compiled library writes it.
    """
    on_device = jax.sharding.SingleDeviceSharding(device)
    zeros = jnp.zeros((SIZE, SIZE), jnp.bfloat16, device=device)
    multiply = jax.jit(jnp.matmul).lower(zeros, zeros).compile()
    mark = jax.jit(_device_clock, out_shardings=on_device).lower().compile()
    jax.block_until_ready((multiply(zeros, zeros), mark()))
    return timed_queue(
        lambda: multiply(zeros, zeros), mark, lambda first, last: (nanoseconds(last) - nanoseconds(first)) / 1e6
    )


def _device_clock() -> UInt32[Array, "2"]:
    return native.call("device_clock", [], [jax.ShapeDtypeStruct((2,), jnp.uint32)])[0]


def nanoseconds(words: UInt32[Array, "2"]) -> int:
    """The time of a mark, of which the low word comes first. It waits for the device."""
    low, high = np.asarray(words).tolist()
    return low + (high << 32)
