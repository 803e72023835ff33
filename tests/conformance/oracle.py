"""The right result of a grouped matmul, row by row in float64, and the function that the suite compares with it."""

import functools

import jax
import numpy as np

from jax_latent_moe.grouped_matmul import grouped_matmul, grouped_wgrad


def rows_of_experts(group_sizes) -> list[int]:
    """The expert of each row, without the padding rows."""
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


def oracle_run(rows, w, group_sizes, dout, transpose_w=False):
    """The results that `compiled` must return, by name."""
    wgrad = oracle_wgrad(rows, dout, group_sizes)
    return {
        "out": oracle_matmul(rows, w, group_sizes, transpose_w),
        "gradient of rows": oracle_matmul(dout, w, group_sizes, not transpose_w),
        "gradient of w": wgrad.swapaxes(1, 2) if transpose_w else wgrad,
        "wgrad": wgrad,
    }


@functools.cache
def compiled(row, transpose_w=False):
    """Jitted grouped matmul with its gradients, and wgrad: (rows, w, group_sizes, dout) -> arrays by name.

    Weights and rows in codes have no gradient.
    """

    @jax.jit
    def run(rows, w, group_sizes, dout):
        def matmul(rows, w):
            return grouped_matmul(row.rows(rows), w, group_sizes, transpose_w=transpose_w, backend=row.backend)

        if row.row_format is not None:
            return {"out": matmul(rows, w)}
        wgrad = grouped_wgrad(rows, dout, group_sizes, backend=row.backend)
        if row.weight_format is not None:
            out, pullback = jax.vjp(lambda rows: matmul(rows, w), rows)
            return {"out": out, "gradient of rows": pullback(dout)[0], "wgrad": wgrad}
        out, pullback = jax.vjp(matmul, rows, w)
        drows, dw = pullback(dout)
        return {"out": out, "gradient of rows": drows, "gradient of w": dw, "wgrad": wgrad}

    return run


def random_group_sizes(rng, experts, total):
    """Uneven sizes, many of them zero, that add up to total."""
    chosen = rng.integers(experts, size=max(1, experts // 2))
    return np.bincount(rng.choice(chosen, size=total), minlength=experts).astype(np.int32)
