"""Matrix products whose rows belong to experts: three contractions, one signature, any backend.

Rows are sorted by expert and `group_sizes[e]` counts the rows of expert e. Nothing here knows of routing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jax_latent_moe.config import BackendConfig, as_backend
from jax_latent_moe.errors import InputError
from jax_latent_moe.grouped_matmul.fused import FusedActivation
from jax_latent_moe.grouped_matmul.operands import GatheredRows, LastColumns, gathered, scattered
from jax_latent_moe.grouped_matmul.problem import Problem, problem
from jax_latent_moe.grouped_matmul.registry import Backend, FusingBackend, explain, select, select_fusing
from jax_latent_moe.varying import varying

__all__ = [
    "Backend",
    "FusedActivation",
    "FusingBackend",
    "GatheredRows",
    "Problem",
    "explain",
    "grouped_matmul",
    "grouped_wgrad",
    "problem",
    "select",
    "select_fusing",
]


def grouped_matmul(
    rows: Float[Array, "r a"] | GatheredRows,
    w: Float[Array, "e k n"],
    group_sizes: Int[Array, " e"],
    *,
    transpose_w: bool = False,
    backend: str | BackendConfig = "auto",
) -> Float[Array, "r b"]:
    """rows[R,K] x w[e][K,N] -> [R,N] for the rows of each expert; with transpose_w, rows[R,N] x w[e]^T -> [R,K].

    Rows beyond sum(group_sizes) give zeros and leak nowhere, gradients included, even where they hold NaN. An expert
    without rows has an exactly zero gradient. Differentiable in reverse mode with respect to rows and w.

    Args:
        rows: [R, K] (or [R, N] with transpose_w), sorted by expert; `GatheredRows` need not be gathered beforehand.
        w: [E, K, N], of the dtype of rows.
        group_sizes: [E] int32, rows of each expert. Checked when the values are known; under jit, a negative size
            counts as 0 and rows that do not exist are left out.
        transpose_w: contract the last axis of w instead of the second.
        backend: "auto", a name or a backend dataclass.

    Returns:
        [R, N] (or [R, K]) in the dtype of rows, accumulated in float32 (float64 for float64).

    Raises:
        InputError: shapes, dtypes or group sizes do not fit.
        UnsupportedError: the named backend cannot run this.
    """
    rows, w = _check_gathered(rows) if isinstance(rows, GatheredRows) else jnp.asarray(rows), jnp.asarray(w)
    _check_rows("rows", rows.table if isinstance(rows, GatheredRows) else rows)
    if w.ndim != 3 or rows.shape[1] != w.shape[2 if transpose_w else 1]:
        raise InputError(
            f"w of shape {w.shape} does not fit rows of shape {rows.shape}: w is [experts, in, out] and its "
            f"{'out' if transpose_w else 'in'} is the width of rows."
        )
    _check_same_dtype(rows=rows, w=w)
    group_sizes = _check_group_sizes(group_sizes, w.shape[0], rows.shape[0])
    rows, w = varying((rows, w), rows, w, group_sizes)
    return _matmul(as_backend(backend), transpose_w, rows, w, group_sizes)


def grouped_wgrad(
    rows: Float[Array, "r k"],
    dout: Float[Array, "r n"],
    group_sizes: Int[Array, " e"],
    *,
    backend: str | BackendConfig = "auto",
) -> Float[Array, "e k n"]:
    """rows^T x dout over the rows of each expert: [R,K], [R,N] -> [E,K,N].

    Rows beyond sum(group_sizes) leak nowhere; an expert without rows gets exact zeros. Differentiable in reverse mode.

    Args:
        rows: [R, K], sorted by expert.
        dout: [R, N], of the dtype of rows.
        group_sizes: [E] int32, as for `grouped_matmul`.
        backend: "auto", a name or a backend dataclass.

    Raises:
        InputError: shapes, dtypes or group sizes do not fit.
        UnsupportedError: the named backend cannot run this.
    """
    rows, dout = jnp.asarray(rows), jnp.asarray(dout)
    _check_rows("rows", rows)
    _check_rows("dout", dout)
    if rows.shape[0] != dout.shape[0]:
        raise InputError(f"rows of shape {rows.shape} and dout of shape {dout.shape} must have as many rows.")
    _check_same_dtype(rows=rows, dout=dout)
    group_sizes = _check_group_sizes(group_sizes, None, rows.shape[0])
    rows, dout = varying((rows, dout), rows, dout, group_sizes)
    return _outer(as_backend(backend), rows, dout, group_sizes)


def matmul_unchecked(
    rows: Float[Array, "r k"] | GatheredRows | LastColumns,
    w: Float[Array, "e k n"],
    group_sizes: Int[Array, " e"],
    *,
    backend: str | BackendConfig = "auto",
) -> Float[Array, "r n"]:
    """What `grouped_matmul` gives, unchecked and without a derivative, of rows which may be `LastColumns`."""
    w = jnp.asarray(w)
    experts, in_features, out_features = w.shape
    asked = problem("fwd", rows.shape[0], (experts, in_features, out_features), rows.dtype)
    return select(asked, backend).matmul(rows, w, group_sizes, transpose_w=False)


def wgrad_and_operands(
    rows: Float[Array, "r k"] | GatheredRows | LastColumns,
    dout: Float[Array, "r n"] | GatheredRows,
    group_sizes: Int[Array, " e"],
    *,
    backend: str | BackendConfig = "auto",
) -> tuple[Float[Array, "e k n"], Float[Array, "r k"] | LastColumns, Float[Array, "r n"]]:
    """What `grouped_wgrad` gives, unchecked and without a derivative; and its operands, which may be `GatheredRows`.

    `GatheredRows` come back gathered: for who reads them again, once a kernel has gathered them while it multiplied.
    """
    shape = (group_sizes.shape[0], rows.shape[1], dout.shape[1])
    chosen = select(problem("wgrad", rows.shape[0], shape, rows.dtype), backend)
    return chosen.outer(rows, dout, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(backend, transpose_w, rows, w, group_sizes):
    contraction = "dgrad" if transpose_w else "fwd"
    chosen = select(problem(contraction, rows.shape[0], w.shape, rows.dtype), backend)
    return chosen.matmul(rows, w, group_sizes, transpose_w=transpose_w)


def _matmul_fwd(backend, transpose_w, rows, w, group_sizes):
    return _matmul(backend, transpose_w, rows, w, group_sizes), (rows, w, group_sizes)


def _matmul_bwd(backend, transpose_w, residuals, dout):
    rows, w, group_sizes = residuals
    drows = _matmul(backend, not transpose_w, dout, w, group_sizes)
    if isinstance(rows, GatheredRows):
        drows = scattered(rows, drows)
    left, right = (dout, gathered(rows)) if transpose_w else (gathered(rows), dout)
    return drows, _outer(backend, left, right, group_sizes), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _outer(backend, rows, dout, group_sizes):
    return wgrad_and_operands(rows, dout, group_sizes, backend=backend)[0]


def _outer_fwd(backend, rows, dout, group_sizes):
    return _outer(backend, rows, dout, group_sizes), (rows, dout, group_sizes)


def _outer_bwd(backend, residuals, dw):
    rows, dout, group_sizes = residuals
    return _matmul(backend, True, dout, dw, group_sizes), _matmul(backend, False, rows, dw, group_sizes), None


_outer.defvjp(_outer_fwd, _outer_bwd)


def _check_gathered(rows):
    table, row_ids = jnp.asarray(rows.table), jnp.asarray(rows.row_ids)
    if row_ids.ndim != 1 or not jnp.issubdtype(row_ids.dtype, jnp.integer):
        raise InputError(f"row_ids of shape {row_ids.shape} and dtype {row_ids.dtype} must be integers, [rows].")
    if row_ids.size and not table.shape[0]:
        raise InputError(f"table of shape {table.shape} has no row for {row_ids.size} row_ids to name.")
    weights = None if rows.weights is None else jnp.asarray(rows.weights)
    if weights is not None and (weights.shape != row_ids.shape or not jnp.issubdtype(weights.dtype, jnp.floating)):
        raise InputError(
            f"weights of shape {weights.shape} and dtype {weights.dtype} must be floating, one for each of the "
            f"{row_ids.size} row_ids; None leaves rows as they are."
        )
    return GatheredRows(table, row_ids.astype(jnp.int32), weights)


def _check_rows(name, rows):
    if rows.ndim != 2:
        raise InputError(f"{name} of shape {rows.shape} must have two axes: [rows, features].")
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise InputError(f"{name} of dtype {rows.dtype} must be floating: cast it first.")


def _check_same_dtype(**arrays):
    dtypes = {name: array.dtype for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1:
        listed = " and ".join(f"{name} of dtype {dtype}" for name, dtype in dtypes.items())
        raise InputError(f"{listed} must be of one dtype: cast one of them first.")


def _check_group_sizes(group_sizes, num_experts, num_rows):
    group_sizes = jnp.asarray(group_sizes)
    if group_sizes.ndim != 1 or num_experts not in (None, group_sizes.shape[0]):
        expected = "[experts]" if num_experts is None else f"[{num_experts}], one for each expert of w"
        raise InputError(f"group_sizes of shape {group_sizes.shape} must be of shape {expected}.")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise InputError(f"group_sizes of dtype {group_sizes.dtype} must be integers, int32 at best.")
    if not isinstance(group_sizes, Tracer):
        sizes = np.asarray(group_sizes)
        if (sizes < 0).any():
            raise InputError(f"group_sizes[{int(sizes.argmin())}]={sizes.min()} is negative: sizes are at least 0.")
        if sizes.sum() > num_rows:
            raise InputError(f"group_sizes add up to {sizes.sum()}, more than the {num_rows} rows there are.")
    return group_sizes.astype(jnp.int32)
