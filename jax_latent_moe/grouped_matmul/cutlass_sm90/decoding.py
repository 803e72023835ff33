"""Rows by the transpose of a weight in codes: the codes are decoded, and a kernel for dense weights multiplies them.

Codes are stored as [N, K], so the decoded weight is that of a forward product from N to K, and nothing is transposed.
"""

import dataclasses

from jaxtyping import Array, Float

from jax_latent_moe.formats import FORMATS, ScaledArray
from jax_latent_moe.grouped_matmul.problem import Operand, Problem
from jax_latent_moe.grouped_matmul.sm90 import DTYPES

MOST_BYTES = 6 * 2**30
"""The largest decoded weight, which is in memory as a whole while it is multiplied. Super's take 2.6 GiB each."""
FEWEST_ROWS = 4
"""The fewest rows per expert, on average: fewer rows take less time on the portable path, which decodes the weights of
the experts that have rows. The bound is an estimate."""


def decodes(problem: Problem) -> bool:
    """Whether it is a gradient of 16-bit rows, whose weight is in codes."""
    return problem.contraction == "dgrad" and problem.lhs.format in DTYPES and problem.rhs.format in FORMATS


def refusal(problem: Problem) -> str | None:
    """None, or the reason why a weight of a problem that `decodes` is not decoded as a whole."""
    if problem.epilogue is not None:
        return "its gradients through codes have no epilogue: XLA computes the activation's gradient."
    if problem.out.format != problem.lhs.format:
        return f"its gradients through codes keep the dtype of the rows, {problem.lhs.format}: cast the result."
    nbytes = problem.num_experts * problem.k * problem.n * 2
    if nbytes > MOST_BYTES:
        return (
            f"the decoded weight would take {nbytes / 2**30:.1f} GiB, more than {MOST_BYTES / 2**30:.0f}: XlaBackend() "
            "decodes it, a few experts at a time."
        )
    if problem.planned_rows < FEWEST_ROWS * problem.num_experts:
        return (
            f"{problem.num_rows} rows are fewer than {FEWEST_ROWS} for each of {problem.num_experts} experts: "
            "XlaBackend() decodes only the experts that have rows."
        )
    return None


def dense(problem: Problem) -> Problem:
    """The forward product from N to K by the decoded weight."""
    rhs = Operand(problem.lhs.format)
    return dataclasses.replace(problem, contraction="fwd", k=problem.n, n=problem.k, rhs=rhs)


def decoded(w: ScaledArray, dtype) -> Float[Array, "e n k"]:
    """The transposed weight [E, P N, K], with the rows of all P matrices below each other."""
    values = FORMATS[w.format].decode(w.codes, w.scales, dtype)
    return values.reshape(values.shape[0], -1, values.shape[-1])
