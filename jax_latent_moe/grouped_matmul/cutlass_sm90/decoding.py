"""Rows by the transpose of a weight in codes: a kernel decodes them, and a kernel for dense weights multiplies them.

Codes are stored as [N, K], so the decoded weight is that of a forward product from N to K, and nothing is transposed. A
weight that would be too large is decoded in parts of K, one after the other.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_latent_moe import native
from jax_latent_moe.formats import FORMATS, ScaledArray
from jax_latent_moe.grouped_matmul.cutlass_sm90.codes import CODES, READ_BYTES, readable, stored
from jax_latent_moe.grouped_matmul.operands import Operands, Outputs, operand_of
from jax_latent_moe.grouped_matmul.problem import Operand, Problem
from jax_latent_moe.grouped_matmul.sm90 import DTYPES

MOST_BYTES = 4 * 2**30
"""The largest part of a decoded weight that is in memory at a time. Super's weights take 2.6 GiB each."""
PART_MULTIPLE = 128
"""A part of K is a multiple of this."""
FEWEST_ROWS = 4
"""The fewest rows per expert, on average: fewer rows take less time on the portable path, which decodes the weights of
the experts that have rows. The bound is an estimate."""


def decodes(problem: Problem) -> bool:
    """Whether it is a gradient of 16-bit rows, whose weight is in codes."""
    return problem.contraction == "dgrad" and problem.lhs.format in DTYPES and problem.rhs.format in CODES


def refusal(problem: Problem) -> str | None:
    """None, or the reason why the weight of a problem that `decodes` cannot be decoded for it."""
    if problem.epilogue is not None:
        return "its gradients through codes have no epilogue: XLA computes the activation's gradient."
    if problem.out.format != problem.lhs.format:
        return f"its gradients through codes keep the dtype of the rows, {problem.lhs.format}: cast the result."
    multiple = READ_BYTES * FORMATS[problem.rhs.format].packing
    if problem.k % multiple:
        return (
            f"its kernel decodes weights with a multiple of {multiple} inputs, not {problem.k}: XlaBackend() decodes "
            "others."
        )
    if problem.planned_rows < FEWEST_ROWS * problem.num_experts:
        return (
            f"{problem.num_rows} rows are fewer than {FEWEST_ROWS} for each of {problem.num_experts} experts: "
            "XlaBackend() decodes only the experts that have rows."
        )
    return None


def dense(problem: Problem) -> Problem:
    """The forward product from N to a part of K by the decoded weight."""
    rhs = Operand(problem.lhs.format)
    return dataclasses.replace(problem, contraction="fwd", k=problem.n, n=_part(problem), rhs=rhs)


def run(problem: Problem, operands: Operands, multiply: Callable[[Problem, Operands], Outputs]) -> Outputs:
    """The product. multiply runs the problem `dense`, or one with fewer columns."""
    weight, part, whole = readable(operands.rhs), _part(problem), dense(problem)
    outs = []
    for first in range(0, problem.k, part):
        width = min(part, problem.k - first)
        dense_weight = decoded(weight, first, width, problem.lhs.format)
        outputs = multiply(dataclasses.replace(whole, n=width), operands._replace(rhs=dense_weight))
        # A kernel that gathered the rows returns them.
        operands, whole = operands._replace(lhs=outputs.lhs), dataclasses.replace(whole, lhs=operand_of(outputs.lhs))
        outs.append(outputs.out)
        if first + width < problem.k:
            # Otherwise XLA could decode all parts before it multiplies the first one.
            weight, outs[-1] = jax.lax.optimization_barrier((weight, outs[-1]))
    return Outputs(outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1), lhs=operands.lhs)


def decoded(w: ScaledArray, first: int, width: int, dtype) -> Float[Array, "e n width"]:
    """Elements first to first + width - 1 along K of the transposed weight [E, P N, K]. The P matrices are stacked.

    The values are those of `formats.decode`, to the bit.
    """
    experts, parts, n, _ = w.codes.shape
    result = jax.ShapeDtypeStruct((experts, parts * n, width), dtype)
    return native.call("decode_weight", stored(w), [result], code=CODES[w.format][0], first=first)[0]


def _part(problem):
    """The columns that are decoded at a time: all, or so many that the parts are of one size."""
    parts = -(-problem.num_experts * problem.n * problem.k * 2 // MOST_BYTES)
    each = -(-problem.k // max(parts, 1))
    return min(problem.k, -(-each // PART_MULTIPLE) * PART_MULTIPLE)
