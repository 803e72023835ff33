"""bfloat16 rows by a weight in codes, in kernels that widen the codes on their way to the matrix units."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_latent_moe.errors import InputError
from jax_latent_moe.formats import FORMATS, ScaledArray
from jax_latent_moe.grouped_matmul.cutlass_sm90.calls import call, call_with_activation, table
from jax_latent_moe.grouped_matmul.cutlass_sm90.codes import (
    CODES,
    READ_BYTES,
    readable,
    side_by_side,
    stored,
)
from jax_latent_moe.grouped_matmul.operands import GatheredRows, Operands, Outputs
from jax_latent_moe.grouped_matmul.problem import Problem
from jax_latent_moe.grouped_matmul.sm90 import DTYPES, widen_refusal

FORMAT = "bf16_codes"
"""The format in the names of these kernels."""
COLUMN_MULTIPLE = 8
"""bfloat16 elements in 16 bytes, the unit in which results are stored."""
FEWEST_ROWS = 56
"""With fewer rows per expert, on average, `auto` asks the Pallas kernel first.

On an H200 with 44 rows per expert, Super's layer takes 1.03 ms there and 1.17 ms here in mxfp4, and in int8 1.14 and
1.15; with 88 rows 1.54 and 1.41, and 1.72 and 1.44. The bound lies between the two by estimate.
"""


def widens(problem: Problem) -> bool:
    """Whether the rows are in 16 bits and the weight in codes."""
    return problem.lhs.format in DTYPES and problem.rhs.format in CODES


def has_few_rows(problem: Problem) -> bool:
    """Whether the problem is a forward product that `widens`, and `auto` asks the Pallas kernel first."""
    few = problem.planned_rows < FEWEST_ROWS * problem.num_experts
    return few and problem.contraction == "fwd" and widens(problem)


def refusal(problem: Problem) -> str | None:
    """None, or the reason why the kernels cannot run a problem that `widens`, apart from its epilogue."""
    return widen_refusal(problem, READ_BYTES * FORMATS[problem.rhs.format].packing, COLUMN_MULTIPLE)


def run(problem: Problem, operands: Operands, attributes: dict) -> Outputs:
    """The product, or the hidden rows and their residual if an activation is in the epilogue.

    Args:
        problem: a problem that `widens`.
        operands: the rows, the weight and the group sizes.
        attributes: of the call: the kernel and the order of its tiles.

    Raises:
        InputError: scales have a dtype that the kernels do not read, or the weight is not one matrix for each half of
            a gated activation.
    """
    rows, w, sizes = operands.lhs, readable(operands.rhs), operands.group_sizes
    attributes |= {"code": CODES[w.format][0]}
    if problem.epilogue is None:
        whole = side_by_side(w)
        return _product(rows, whole, sizes, attributes) if whole is not None else _products(rows, w, sizes, attributes)
    halves, parts = 2 if problem.epilogue.activation.gated else 1, w.codes.shape[1]
    if parts != halves:
        raise InputError(
            f"the codes of w are {parts} matrices side by side, but {problem.epilogue.activation} needs {halves}: "
            f"encode them with parts={halves}."
        )
    attributes |= {"gathered": isinstance(rows, GatheredRows)}
    return call_with_activation("matmul_widened", problem, rows, (table(rows), *stored(w), sizes), attributes)


def _product(rows, w, sizes, attributes) -> Outputs:
    """The product with one matrix of each expert."""
    outs = [jax.ShapeDtypeStruct((count, w.shape[2]), rows.dtype) for count in (0, rows.shape[0])]
    attributes |= {"gathered": isinstance(rows, GatheredRows), "keep_residual": False, "beta": 0.0, "linear_beta": 0.0}
    (_, out), lhs = call("matmul_widened", outs, rows, (table(rows), *stored(w), sizes), attributes)
    return Outputs(out, lhs=lhs)


def _products(rows, w, sizes, attributes) -> Outputs:
    """The products with several matrices of each expert, one after the other. They count as experts of their own."""
    experts, parts, n, _ = w.codes.shape
    w, found = _padded(w), []
    matrices = jax.tree.map(lambda leaf: leaf.reshape(experts * parts, 1, *leaf.shape[2:]), w)
    for part in range(parts):
        # The other matrices have no rows.
        own = jnp.zeros((experts, parts), sizes.dtype).at[:, part].set(sizes)
        outputs = _product(rows, matrices, own.reshape(-1), attributes)
        rows = outputs.lhs
        found.append(outputs.out[:, :n])
    return Outputs(jnp.concatenate(found, axis=1), lhs=rows)


def _padded(w: ScaledArray) -> ScaledArray:
    """The matrices with zeros as further outputs, up to a multiple of COLUMN_MULTIPLE."""
    missing = -w.codes.shape[2] % COLUMN_MULTIPLE
    if not missing:
        return w

    def pad(array):
        return jnp.pad(array, ((0, 0), (0, 0), (0, missing), (0, 0)))

    # A block of e4m3's scales covers the further outputs already.
    scales = w.scales | ({"block": pad(w.scales["block"])} if w.format == "nvfp4" else {})
    return dataclasses.replace(w, codes=pad(w.codes), scales=scales)
