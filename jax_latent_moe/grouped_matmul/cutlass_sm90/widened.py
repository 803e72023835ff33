"""bfloat16 rows by a weight in codes, in kernels that widen the codes on their way to the matrix units."""

import dataclasses

import jax

from jax_latent_moe.errors import InputError
from jax_latent_moe.formats import FORMATS, ScaledArray
from jax_latent_moe.formats.fp8 import wide_scales
from jax_latent_moe.grouped_matmul.cutlass_sm90.calls import call, call_with_activation, table
from jax_latent_moe.grouped_matmul.cutlass_sm90.codes import CODES, READ_BYTES, stored, wrong_scales
from jax_latent_moe.grouped_matmul.operands import GatheredRows, Operands, Outputs
from jax_latent_moe.grouped_matmul.problem import Problem
from jax_latent_moe.grouped_matmul.sm90 import DTYPES, widen_refusal

FORMAT = "bf16_codes"
"""The format in the names of these kernels."""
COLUMN_MULTIPLE = 8
"""bfloat16 elements in 16 bytes, the unit in which results are stored."""
FEWEST_ROWS = 32
"""With fewer rows per expert, on average, `auto` takes the Pallas kernel first, whose tiles may have as few as 8 rows.

It is an estimate: these kernels multiply at least 64 rows of a tile, and neither kernel was timed around the bound.
"""


def widens(problem: Problem) -> bool:
    """Whether the rows are in 16 bits and the weight in codes."""
    return problem.lhs.format in DTYPES and problem.rhs.format in CODES


def has_few_rows(problem: Problem) -> bool:
    """Whether the problem `widens`, and `auto` asks the Pallas kernel first."""
    return widens(problem) and problem.planned_rows < FEWEST_ROWS * problem.num_experts


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
    rows, w = operands.lhs, _readable(operands.rhs)
    attributes |= {"code": CODES[w.format][0], "gathered": isinstance(rows, GatheredRows)}
    arrays = table(rows), *stored(w), operands.group_sizes
    if problem.epilogue is None:
        outs = [jax.ShapeDtypeStruct((count, problem.n), rows.dtype) for count in (0, problem.num_rows)]
        attributes |= {"keep_residual": False, "beta": 0.0, "linear_beta": 0.0}
        (_, out), lhs = call("matmul_widened", outs, rows, arrays, attributes)
        return Outputs(out, lhs=lhs)
    halves, parts = 2 if problem.epilogue.activation.gated else 1, w.codes.shape[1]
    if parts != halves:
        raise InputError(
            f"the codes of w are {parts} matrices side by side, but {problem.epilogue.activation} needs {halves}: "
            f"encode them with parts={halves}."
        )
    return call_with_activation("matmul_widened", problem, rows, arrays, attributes)


def _readable(w: ScaledArray) -> ScaledArray:
    """The weight with its 32-bit scales in float32, whatever they are stored in."""
    scales = dict(w.scales)
    for name, wanted in CODES[w.format][1].items():
        if wanted == "float32":
            scales[name] = wide_scales(scales) if name == "block" else scales[name].astype(wanted)
    w = dataclasses.replace(w, scales=scales)
    if (reason := wrong_scales("w", w)) is not None:
        raise InputError(f"{reason}: convert them, or decode the weight with XlaBackend().")
    return w
