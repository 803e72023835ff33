"""The oracle for tests and readers: a float64 NumPy loop over experts, independent of all backends."""

import numpy as np
from jaxtyping import Float, Int

from jax_latent_moe.errors import InputError


def grouped_matmul(
    rows: Float[np.ndarray, "r a"],
    w: Float[np.ndarray, "e k n"],
    group_sizes: Int[np.ndarray, " e"],
    *,
    transpose_w: bool = False,
) -> Float[np.ndarray, "r b"]:
    """Rows x w (or w^T) for the rows of each expert, in float64; rows beyond sum(group_sizes) are zero.

    Raises:
        InputError: a group size is negative, or the sizes add up to more than R.
    """
    rows, w = np.asarray(rows, np.float64), np.asarray(w, np.float64)
    out = np.zeros((rows.shape[0], w.shape[1 if transpose_w else 2]))
    for expert, group in _groups(group_sizes, rows.shape[0]):
        out[group] = rows[group] @ (w[expert].T if transpose_w else w[expert])
    return out


def grouped_wgrad(
    rows: Float[np.ndarray, "r k"], dout: Float[np.ndarray, "r n"], group_sizes: Int[np.ndarray, " e"]
) -> Float[np.ndarray, "e k n"]:
    """rows^T x dout over the rows of each expert, in float64; zero for an expert without rows.

    Raises:
        InputError: a group size is negative, or the sizes add up to more than R.
    """
    rows, dout = np.asarray(rows, np.float64), np.asarray(dout, np.float64)
    out = np.zeros((len(group_sizes), rows.shape[1], dout.shape[1]))
    for expert, group in _groups(group_sizes, rows.shape[0]):
        out[expert] = rows[group].T @ dout[group]
    return out


def _groups(group_sizes, num_rows):
    start = 0
    for expert, size in enumerate(np.asarray(group_sizes).tolist()):
        if size < 0 or start + size > num_rows:
            raise InputError(
                f"group_sizes[{expert}]={size} after {start} rows does not fit {num_rows} rows: sizes are at least 0 "
                "and add up to at most the number of rows."
            )
        yield expert, slice(start, start + size)
        start += size
