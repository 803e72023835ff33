"""Work that keeps a GPU busy while the host queues calls behind it, so that only the GPU's time is measured."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

SIZE = 8192
"""Rows and columns of the matmul that is one block of such work. On an H200 it takes 1.4 ms."""


@dataclasses.dataclass(frozen=True)
class Queue:
    """A stream of a GPU, which runs calls in the order in which they are queued.

    Attributes:
        block: queues about a millisecond of work or more, and returns a mark of its end.
        is_done: whether the device has reached a mark.
        wait: blocks until the device has reached a mark.
    """

    block: Callable[[], Any]
    is_done: Callable[[Any], bool]
    wait: Callable[[Any], Any] = jax.block_until_ready


@functools.cache
def jax_queue(device: Any) -> Queue:
    """The stream on which JAX computes on a device. It keeps a matrix of `SIZE` x `SIZE` bfloat16 there.

    The matrix is zero, so that the matmuls draw little power and leave the clocks as they are.
    """
    zeros = jnp.zeros((SIZE, SIZE), jnp.bfloat16, device=device)
    multiply = jax.jit(jnp.matmul).lower(zeros, zeros).compile()
    jax.block_until_ready(multiply(zeros, zeros))
    return Queue(lambda: multiply(zeros, zeros), lambda out: out.is_ready())
