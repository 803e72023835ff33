"""Matrix products whose rows belong to experts: three contractions, one signature, any backend.

Rows are sorted by expert, and `group_sizes[e]` counts the rows of expert e. This package does not depend on routing.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jax_latent_moe.arrays import as_numbers, check_fits_int32, given_numbers
from jax_latent_moe.errors import InputError
from jax_latent_moe.formats import ScaledArray, ScaledRows
from jax_latent_moe.grouped_matmul.backend import Backend
from jax_latent_moe.grouped_matmul.operands import (
    GatheredRows,
    LastColumns,
    Operands,
    Outputs,
    gathered,
    operand_of,
    scattered,
)
from jax_latent_moe.grouped_matmul.problem import Epilogue, Operand, Problem, problem
from jax_latent_moe.grouped_matmul.registry import (
    BackendConfig,
    Bound,
    as_backend,
    explain,
    fused,
    gradient_backend,
    register,
    select,
)
from jax_latent_moe.varying import varying

__all__ = [
    "Backend",
    "Bound",
    "Epilogue",
    "GatheredRows",
    "LastColumns",
    "Operand",
    "Operands",
    "Outputs",
    "Problem",
    "as_backend",
    "explain",
    "fused",
    "grouped_matmul",
    "grouped_wgrad",
    "operand_of",
    "problem",
    "register",
    "select",
]


def grouped_matmul(
    rows: Float[Array, "r a"] | ScaledRows | GatheredRows,
    w: Float[Array, "e k n"] | ScaledArray,
    group_sizes: Int[Array, " e"],
    *,
    transpose_w: bool = False,
    precision: jax.lax.Precision | None = None,
    backend: str | BackendConfig = "auto",
) -> Float[Array, "r b"]:
    """rows[R,K] x w[e][K,N] -> [R,N] for the rows of each expert; with transpose_w, rows[R,N] x w[e]^T -> [R,K].

    Rows beyond sum(group_sizes) are padding rows. They give zeros and affect no other value or gradient, even if they
    hold NaN. An expert without rows has an exactly zero gradient. The function is differentiable in reverse mode with
    respect to rows and w.

    Args:
        rows: [R, K] (or [R, N] with transpose_w), sorted by expert, as an array, as `ScaledRows`, which get no
            gradient, or as `GatheredRows`. A product of rows in codes is a constant to `jax.grad`.
        w: [E, K, N] in the dtype of rows, or a `ScaledArray`, which gets no gradient. Rows that are `ScaledRows` need a
            `ScaledArray`: the product then multiplies codes.
        group_sizes: [E] int32, the number of rows of each expert. The values are checked when they are known. Under
            jit, a negative size counts as 0, and groups are cut at the last row.
        transpose_w: contract the last axis of w instead of the second.
        precision: for XLA's float32 products, here and in all derivatives; None takes `jax_default_matmul_precision`.
            Kernels multiply 16-bit operands exactly and have no lower precision.
        backend: "auto", a name or a backend dataclass.

    Returns:
        [R, N] (or [R, K]) in the dtype of rows, accumulated in float32 (float64 for float64).

    Raises:
        InputError: shapes, dtypes or group sizes do not fit.
        UnsupportedError: the named backend cannot run this.
    """
    if not isinstance(precision, jax.lax.Precision | None):
        raise InputError(
            f"precision={precision!r} must be a jax.lax.Precision or None: `formats.encode_rows` and `formats.encode` "
            "make operands in FP8."
        )
    if isinstance(rows, ScaledArray) or isinstance(w, ScaledRows):
        raise InputError("rows may be ScaledRows and w a ScaledArray: `encode_rows` encodes rows, `encode` weights.")
    if isinstance(rows, GatheredRows):
        rows = _check_gathered(rows)
    elif not isinstance(rows, ScaledRows):
        rows = as_numbers("rows", rows)
    w = w if isinstance(w, ScaledArray) else as_numbers("w", w)
    table = rows.table if isinstance(rows, GatheredRows) else rows
    _check_rows("rows", table)
    if w.ndim != 3 or rows.shape[1] != w.shape[2 if transpose_w else 1]:
        raise InputError(
            f"w of shape {w.shape} does not fit rows of shape {rows.shape}: w is [experts, in, out] and its "
            f"{'out' if transpose_w else 'in'} is the width of rows."
        )
    if not isinstance(w, ScaledArray):
        if isinstance(table, ScaledRows):
            raise InputError(
                f"rows in {table.format} need a weight in codes, not one of dtype {w.dtype}: `formats.encode` makes "
                "codes, and `rows.decode(dtype)` gives dense rows."
            )
        _check_same_dtype(rows=rows, w=w)
    group_sizes = _check_group_sizes(group_sizes, w.shape[0], rows.shape[0])
    rows, w = varying((rows, w), rows, w, group_sizes)
    return _matmul(as_backend(backend), precision, transpose_w, rows, w, group_sizes)


def grouped_wgrad(
    rows: Float[Array, "r k"],
    dout: Float[Array, "r n"],
    group_sizes: Int[Array, " e"],
    *,
    backend: str | BackendConfig = "auto",
) -> Float[Array, "e k n"]:
    """rows^T x dout over the rows of each expert: [R,K], [R,N] -> [E,K,N].

    Rows beyond sum(group_sizes) are padding rows and affect no value. An expert without rows gets exact zeros. The
    function is differentiable in reverse mode.

    Args:
        rows: [R, K], sorted by expert.
        dout: [R, N], in the dtype of rows.
        group_sizes: [E] int32, as for `grouped_matmul`.
        backend: "auto", a name or a backend dataclass.

    Raises:
        InputError: shapes, dtypes or group sizes do not fit.
        UnsupportedError: the named backend cannot run this.
    """
    if any(isinstance(array, ScaledRows | ScaledArray) for array in (rows, dout)):
        raise InputError("rows and dout must be arrays, not codes: `decode(dtype)` gives their values.")
    rows, dout = as_numbers("rows", rows), as_numbers("dout", dout)
    _check_rows("rows", rows)
    _check_rows("dout", dout)
    if rows.shape[0] != dout.shape[0]:
        raise InputError(f"rows of shape {rows.shape} and dout of shape {dout.shape} must have equal numbers of rows.")
    _check_same_dtype(rows=rows, dout=dout)
    group_sizes = _check_group_sizes(group_sizes, None, rows.shape[0])
    rows, dout = varying((rows, dout), rows, dout, group_sizes)
    return _wgrad(as_backend(backend), None, rows, dout, group_sizes)


def _within(precision):
    # A context, because no argument reaches the products inside of a backend. None keeps the user's own context.
    return contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision.name.lower())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _matmul(backend, precision, transpose_w, rows, w, group_sizes):
    contraction = "dgrad" if transpose_w else "fwd"
    asked = problem(contraction, rows.shape[0], w.shape, rows.dtype, lhs=operand_of(rows), rhs=operand_of(w))
    with _within(precision):
        return select(asked, backend)(Operands(rows, w, group_sizes)).out


def _matmul_fwd(backend, precision, transpose_w, rows, w, group_sizes):
    return _matmul(backend, precision, transpose_w, rows, w, group_sizes), (rows, w, group_sizes)


def _matmul_bwd(backend, precision, transpose_w, residuals, dout):
    rows, w, group_sizes = residuals
    if isinstance(rows.table if isinstance(rows, GatheredRows) else rows, ScaledRows):
        return None, None, None
    if isinstance(w, ScaledArray):
        contraction = "fwd" if transpose_w else "dgrad"
        asked = problem(contraction, dout.shape[0], w.shape, dout.dtype, lhs=operand_of(dout), rhs=operand_of(w))
        backend = gradient_backend(asked, backend)
    drows = _matmul(backend, precision, not transpose_w, dout, w, group_sizes)
    if isinstance(rows, GatheredRows):
        drows = scattered(rows, drows)
    if isinstance(w, ScaledArray):
        return drows, None, None
    left, right = (dout, gathered(rows)) if transpose_w else (gathered(rows), dout)
    return drows, _wgrad(backend, precision, left, right, group_sizes), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _wgrad(backend, precision, rows, dout, group_sizes):
    asked = problem("wgrad", rows.shape[0], (group_sizes.shape[0], rows.shape[1], dout.shape[1]), rows.dtype)
    with _within(precision):
        return select(asked, backend)(Operands(rows, dout, group_sizes)).out


def _wgrad_fwd(backend, precision, rows, dout, group_sizes):
    return _wgrad(backend, precision, rows, dout, group_sizes), (rows, dout, group_sizes)


def _wgrad_bwd(backend, precision, residuals, dw):
    rows, dout, group_sizes = residuals
    drows = _matmul(backend, precision, True, dout, dw, group_sizes)
    return drows, _matmul(backend, precision, False, rows, dw, group_sizes), None


_wgrad.defvjp(_wgrad_fwd, _wgrad_bwd)


def _check_gathered(rows):
    table = rows.table if isinstance(rows.table, ScaledRows) else as_numbers("table", rows.table)
    row_ids = given_numbers("row_ids", rows.row_ids)
    if row_ids.ndim != 1 or not jnp.issubdtype(row_ids.dtype, jnp.integer):
        raise InputError(f"row_ids of shape {row_ids.shape} and dtype {row_ids.dtype} must be integers, [rows].")
    if row_ids.size and not table.shape[0]:
        raise InputError(f"table of shape {table.shape} has no rows, but there are {row_ids.size} row_ids.")
    weights = None if rows.weights is None else as_numbers("weights", rows.weights)
    if weights is not None and isinstance(table, ScaledRows):
        raise InputError(f"a table in {table.format} has no weights: multiply the rows before they are encoded.")
    if weights is not None and (weights.shape != row_ids.shape or not jnp.issubdtype(weights.dtype, jnp.floating)):
        raise InputError(
            f"weights of shape {weights.shape} and dtype {weights.dtype} must be floating, with one for each of the "
            f"{row_ids.size} row_ids; weights=None does not scale the rows."
        )
    check_fits_int32("row_ids", row_ids)
    return GatheredRows(table, jnp.asarray(row_ids).astype(jnp.int32), weights)


def _check_rows(name, rows):
    if rows.ndim != 2:
        raise InputError(f"{name} of shape {rows.shape} must have two axes: [rows, features].")
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise InputError(f"{name} of dtype {rows.dtype} must be floating: cast it first.")


def _check_same_dtype(**arrays):
    dtypes = {name: array.dtype for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1:
        listed = " and ".join(f"{name} of dtype {dtype}" for name, dtype in dtypes.items())
        raise InputError(f"{listed} must have the same dtype: cast one of them first.")


def _check_group_sizes(group_sizes, num_experts, num_rows):
    group_sizes = given_numbers("group_sizes", group_sizes)
    if group_sizes.ndim != 1 or num_experts not in (None, group_sizes.shape[0]):
        expected = "[experts]" if num_experts is None else f"[{num_experts}], one for each expert of w"
        raise InputError(f"group_sizes of shape {group_sizes.shape} must be of shape {expected}.")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise InputError(f"group_sizes of dtype {group_sizes.dtype} must be integers, preferably int32.")
    if not isinstance(group_sizes, Tracer):
        sizes = np.asarray(group_sizes)
        if (sizes < 0).any():
            raise InputError(f"group_sizes[{int(sizes.argmin())}]={sizes.min()} is negative: sizes are at least 0.")
        if (sizes > num_rows).any() or sizes.sum() > num_rows:
            raise InputError(f"group_sizes add up to {sum(sizes.tolist())}, more than the {num_rows} rows given.")
    return jnp.asarray(group_sizes).astype(jnp.int32)
