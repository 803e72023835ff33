"""Calls of the compiled kernels whose rows are dense, gathered, or columns of wider rows."""

import jax
import jax.numpy as jnp

from jax_latent_moe import native
from jax_latent_moe.grouped_matmul.operands import GatheredRows, LastColumns, Outputs
from jax_latent_moe.grouped_matmul.sm90 import kernel_activation


def tables(operands):
    """The arrays of both operands, gathered or not, and the group sizes."""
    return (*(table(operand) for operand in operands[:2]), operands.group_sizes)


def table(operand):
    """The array that an operand's rows are in."""
    if isinstance(operand, LastColumns):
        return operand.matrix
    return operand.table if isinstance(operand, GatheredRows) else operand


def call(target, outs, rows, operands, attributes, **options):
    """The results of a target, and `rows` as a dense array if the kernel gathered them, else as given."""
    named = isinstance(rows, GatheredRows)
    row_ids, weights = (rows.row_ids, rows.weights) if named else (jnp.zeros(0, jnp.int32), None)
    weights = jnp.zeros(0) if weights is None else weights
    # A kernel takes tiles from both ends of the queue and counts those taken from each. With gathered rows it also
    # counts the chunks of rows taken from each end, and the rows gathered so far, in all and in each block of 64.
    counters = 5 + -(-rows.shape[0] // 64) if named else 2
    workspace = jax.ShapeDtypeStruct(rows.shape if named else (0, 0), rows.dtype)
    outs = [*outs, workspace, jax.ShapeDtypeStruct((counters,), jnp.int32)]
    operands = *operands, row_ids, weights.astype(jnp.float32)
    *results, gathered_rows, _ = native.call(target, operands, outs, **options, **attributes)
    return results, gathered_rows if named else rows


def call_with_activation(target, problem, rows, operands, attributes) -> Outputs:
    """The hidden rows of a product with an activation in its epilogue, and its residual."""
    residual, activation = problem.epilogue.residual, kernel_activation(problem.epilogue.activation)
    assert activation is not None, "supports refuses an activation that the epilogues do not have"
    width = problem.n // (2 if activation.gated else 1)
    keeps = residual in ("pre", "gate_hidden")
    outs = [
        jax.ShapeDtypeStruct((problem.num_rows if keeps else 0, problem.n), rows.dtype),
        jax.ShapeDtypeStruct((0 if residual == "gate_hidden" else problem.num_rows, width), rows.dtype),
    ]
    attributes |= {"beta": activation.beta, "linear_beta": activation.linear_beta, "keep_residual": keeps}
    (kept, hidden), lhs = call(target, outs, rows, operands, attributes)
    if residual == "gate_hidden":
        return Outputs(LastColumns(kept, width), residual=kept, lhs=lhs)
    return Outputs(hidden, residual=kept if keeps else hidden if residual == "hidden" else None, lhs=lhs)
