"""Every way to run a grouped matmul: a new backend joins the whole suite by one line here."""

import functools

import jax
import numpy as np
import pytest

from jax_latent_moe.config import XlaBackend
from jax_latent_moe.grouped_matmul import grouped_matmul, grouped_wgrad

BACKENDS = {
    "xla": XlaBackend(),
    "xla-block-1": XlaBackend(block_rows=1),
    "xla-block-3": XlaBackend(block_rows=3),
    "xla-ragged-dot": XlaBackend(method="ragged_dot"),
}

every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


def rows_of_experts(group_sizes) -> list[int]:
    """The expert of each row that has one."""
    return [expert for expert, size in enumerate(group_sizes) for _ in range(size)]


def oracle_matmul(rows, w, group_sizes, transpose_w=False):
    """Row by row, in float64."""
    out = np.zeros((len(rows), w.shape[1 if transpose_w else 2]))
    for row, expert in enumerate(rows_of_experts(group_sizes)):
        kernel = w[expert].T if transpose_w else w[expert]
        out[row] = np.float64(rows[row]) @ np.float64(kernel)
    return out


def oracle_wgrad(rows, dout, group_sizes):
    """Row by row, in float64."""
    out = np.zeros((len(group_sizes), rows.shape[1], dout.shape[1]))
    for row, expert in enumerate(rows_of_experts(group_sizes)):
        out[expert] += np.outer(np.float64(rows[row]), np.float64(dout[row]))
    return out


@functools.cache
def compiled(backend, transpose_w=False):
    """Jitted grouped matmul with both gradients, and the outer product: (rows, w, group_sizes, dout) -> arrays."""

    @jax.jit
    def run(rows, w, group_sizes, dout):
        out, pullback = jax.vjp(
            lambda rows, w: grouped_matmul(rows, w, group_sizes, transpose_w=transpose_w, backend=backend), rows, w
        )
        return out, *pullback(dout), grouped_wgrad(rows, dout, group_sizes, backend=backend)

    return run


def oracle_run(rows, w, group_sizes, dout, transpose_w=False):
    """What `compiled` must return."""
    outer = oracle_wgrad(rows, dout, group_sizes)
    return (
        oracle_matmul(rows, w, group_sizes, transpose_w),
        oracle_matmul(dout, w, group_sizes, not transpose_w),
        outer.swapaxes(1, 2) if transpose_w else outer,
        outer,
    )


def random_group_sizes(rng, experts, total):
    """Uneven sizes, many of them zero, that add up to total."""
    chosen = rng.integers(experts, size=max(1, experts // 2))
    return np.bincount(rng.choice(chosen, size=total), minlength=experts).astype(np.int32)
