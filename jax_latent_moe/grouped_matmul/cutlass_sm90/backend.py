"""The `cutlass` backend: compiled Hopper kernels behind XLA FFI custom calls (custom_calls/)."""

import jax
import jax.numpy as jnp

from jax_latent_moe import native
from jax_latent_moe.formats import ScaledRows
from jax_latent_moe.formats.both_layouts import POWER_OF_TWO
from jax_latent_moe.formats.fp8 import wide_scales
from jax_latent_moe.grouped_matmul.backend import Backend
from jax_latent_moe.grouped_matmul.cutlass_sm90 import decoding, widened
from jax_latent_moe.grouped_matmul.cutlass_sm90 import tiles as cutlass_tiles
from jax_latent_moe.grouped_matmul.cutlass_sm90.calls import call, call_with_activation, tables
from jax_latent_moe.grouped_matmul.cutlass_sm90.config import CutlassTile
from jax_latent_moe.grouped_matmul.operands import GatheredRows, LastColumns, Outputs
from jax_latent_moe.grouped_matmul.sm90 import (
    FP8,
    both_fp8,
    fp8_refusal,
    fuse_refusal,
    kernel_activation,
    library,
    refusal,
)

FEATURE_MULTIPLE = 8
"""16-bit elements in 16 bytes, the unit in which rows are read."""
FP8_MULTIPLE, FP8_BLOCK = 16, 128
"""Codes in 16 bytes, and along each axis of a block that shares a scale."""
MAX_ROWS = 2**31 - 256
FEW_PRODUCTS = 1024
"""Below this many products per gathered element, a kernel would wait for its rows, and XLA gathers them beforehand.

Kernels waited at 768 products and did not wait at 1536 (benchmarks/results/profiles/h200-2026-11-27.md).
"""

# Activations that were faster inside of a product when they were measured (benchmarks/results/profiles).
FASTER = {
    "fwd": ("relu2", "gelu", "swiglu", "geglu", "geglu_tanh", "situ_glu"),
    "dgrad": ("relu2", "gelu", "swiglu", "geglu", "geglu_tanh"),
}
# Those with which an FP8 product that also encodes the hidden rows, or the gradient, was faster than a product and an
# encoder. With relu2's gradient the kernels take 3 % less of a layer's time, but the layer was not faster.
FASTER_ENCODED = {"fwd": ("relu2",), "dgrad": ()}


class Cutlass(Backend):
    """The `cutlass` backend: see `CutlassBackend` for its settings."""

    fuses_one_group = True

    def supports(self, problem):
        """None, or the reason why the kernels cannot run the problem."""
        if decoding.decodes(problem):
            return decoding.refusal(problem) or self.supports(decoding.dense(problem))
        if both_fp8(problem):
            reason = _fp8_refusal(problem)
        elif widened.widens(problem):
            reason = widened.refusal(problem)
        else:
            reason = refusal(problem, FEATURE_MULTIPLE)
        if reason:
            return reason
        if problem.num_experts == 0:
            return "num_experts=0 must be at least 1."
        if problem.planned_rows >= MAX_ROWS:
            return f"num_rows={problem.num_rows} must be below {MAX_ROWS}: tiles count rows in 32 bits."
        if (reason := library(problem.device).missing) is not None:
            return reason
        if problem.epilogue is not None:
            encodes = problem.epilogue.encodes is not None
            if encodes and not both_fp8(problem):
                return "only its FP8 kernels encode hidden rows."
            faster = FASTER_ENCODED if encodes else FASTER
            if reason := fuse_refusal(problem, self.config.fuse, faster):
                return reason
        return cutlass_tiles.refusal(problem, self.given_tile(problem))

    def tiles(self, problem):
        """See `Backend.tiles`."""
        return cutlass_tiles.tiles(decoding.dense(problem) if decoding.decodes(problem) else problem)

    def given_tile(self, problem):
        """See `Backend.given_tile`."""
        if problem.epilogue is not None:
            return None
        return self.config.wgrad_tile if problem.contraction == "wgrad" else self.config.matmul_tile

    def tile_type(self, problem):
        """See `Backend.tile_type`."""
        del problem
        return CutlassTile

    def in_place(self, problem, tile):
        """See `Backend.in_place`.

        Plain products of dense weights read columns of wider rows in place. Kernels with large tiles gather rows, if
        each gathered element has enough products. A wgrad kernel gathers the rows of one operand only. A dgrad kernel
        without an epilogue does not gather rows: that was never measured. Rows in codes are gathered beforehand.
        """
        if both_fp8(problem):
            return ()
        if decoding.decodes(problem):
            return self.in_place(decoding.dense(problem), tile)
        plain, products = problem.epilogue is None, problem.k if problem.contraction == "dgrad" else problem.n
        gathers = tile.rows > cutlass_tiles.SMALL_TILE and problem.planned_rows > 0
        tried = not (problem.contraction == "dgrad" and plain)
        gathers_lhs = problem.lhs.layout == "gathered" and gathers and tried and products >= FEW_PRODUCTS
        gathers_rhs = problem.rhs.layout == "gathered" and gathers and not gathers_lhs and problem.k >= FEW_PRODUCTS
        reads_columns = problem.lhs.layout == "columns" and plain and not widened.widens(problem)
        return ("lhs",) * (gathers_lhs or reads_columns) + ("rhs",) * gathers_rhs

    def insists(self, epilogue):
        """See `Backend.insists`: with fuse="always", an activation or a bias that no kernel has is an error."""
        return self.config.fuse == "always" and (epilogue.bias or kernel_activation(epilogue.activation) is None)

    def run(self, problem, tile, operands):
        """See `Backend.run`."""
        if decoding.decodes(problem):
            return decoding.run(problem, operands, lambda part, given: self.run(part, tile, given))
        attributes = {"kernel": cutlass_tiles.kernel_name(problem, tile)}
        if both_fp8(problem):
            attributes |= {"rows_first": tile.rows_first}
            if problem.contraction == "dgrad":
                return _encoded_grad(problem, operands, attributes)
            encodes = problem.epilogue is not None and problem.epilogue.encodes is not None
            return _encoded(problem, operands, attributes) if encodes else _codes(problem, operands, attributes)
        if problem.contraction == "wgrad":
            return _wgrad(problem, operands, attributes)
        attributes |= {"rows_first": tile.rows_first}
        if widened.widens(problem):
            return widened.run(problem, operands, attributes)
        attributes |= {"gathered": isinstance(operands.lhs, GatheredRows)}
        if problem.epilogue is None:
            width = problem.n if problem.contraction == "fwd" else problem.k
            outs = [jax.ShapeDtypeStruct((problem.num_rows, width), operands.lhs.dtype)]
            attributes |= {"first_column": _first_column(operands.lhs)}
            (out,), lhs = call("matmul", outs, operands.lhs, tables(operands), attributes)
            return Outputs(out, lhs=lhs)
        if problem.contraction == "fwd":
            return call_with_activation("matmul_activation", problem, operands.lhs, tables(operands), attributes)
        return _activation_grad(problem, tile, operands, attributes)


def _fp8_refusal(problem):
    if reason := fp8_refusal(problem, ("bfloat16",), FP8_MULTIPLE, FP8_MULTIPLE, gradients=True):
        return reason
    if problem.epilogue is None:
        return None
    gated, encodes = problem.epilogue.activation.gated, problem.epilogue.encodes
    if encodes is None:
        return "its FP8 kernels have gated activations only where they encode the hidden rows." if gated else None
    if encodes not in FP8:
        return f"its FP8 kernels encode hidden rows in {' or '.join(FP8)}, not {encodes}."
    if gated and problem.contraction == "fwd" and problem.n // 2 % FP8_MULTIPLE:
        return f"half of n={problem.n} of FP8 codes is not a multiple of {FP8_MULTIPLE}: pad it, or use XlaBackend()."
    return None


def _codes(problem, operands, attributes) -> Outputs:
    """The product of codes, or the hidden rows if the epilogue has relu2, which are also its residual."""
    rows, w, group_sizes = operands[:3]
    parts, n = w.codes.shape[1:3]
    if parts > 1 and n % FP8_BLOCK:
        # A block of 128 columns could hold columns of both gate and up, whose scales differ. So each is multiplied
        # separately.
        products = [_matmul_codes(rows, _part(w, part), group_sizes, attributes) for part in range(parts)]
        return Outputs(jnp.concatenate(products, axis=1))
    out = _matmul_codes(rows, w, group_sizes, attributes)
    return Outputs(out, residual=None if problem.epilogue is None or problem.epilogue.residual is None else out)


def _part(w, part):
    return jax.tree.map(lambda leaf: leaf[:, part : part + 1], w)


def _matmul_codes(rows, w, group_sizes, attributes):
    outs = [jax.ShapeDtypeStruct((rows.shape[0], w.shape[2]), rows.dtype), _COUNTERS]
    return native.call("matmul_codes", _arrays(rows, w, group_sizes), outs, **attributes)[0]


def _encoded(problem, operands, attributes) -> Outputs:
    """The hidden rows as codes, and the residual."""
    rows, epilogue = operands.lhs, problem.epilogue
    activation, keeps = kernel_activation(epilogue.activation), epilogue.residual is not None
    assert activation is not None, "supports refuses an activation that the epilogues do not have"
    width = problem.n // (2 if activation.gated else 1)
    outs = [
        jax.ShapeDtypeStruct((problem.num_rows if keeps else 0, problem.n), rows.dtype),
        jax.ShapeDtypeStruct((problem.num_rows, width), jnp.uint8),
        jax.ShapeDtypeStruct((-(-width // FP8_BLOCK), problem.num_rows), jnp.float32),
        _COUNTERS,
    ]
    attributes |= {"beta": activation.beta, "linear_beta": activation.linear_beta, "keep_residual": keeps}
    attributes |= {"power_of_two": POWER_OF_TWO[epilogue.encodes]}
    residual, codes, scales, _ = native.call("matmul_encoded", _arrays(*operands[:3]), outs, **attributes)
    hidden = ScaledRows(codes, {"block": scales.T}, epilogue.encodes, rows.dtype)
    return Outputs(hidden, residual=residual if keeps else None)


def _encoded_grad(problem, operands, attributes) -> Outputs:
    """The gradient of the pre-activation, its codes, and the sums for the rows' weights."""
    kept, format = operands.residual, problem.epilogue.encodes
    scales = jax.ShapeDtypeStruct((-(-problem.k // FP8_BLOCK), problem.num_rows), jnp.float32)
    outs = [
        jax.ShapeDtypeStruct(kept.shape, kept.dtype),
        jax.ShapeDtypeStruct(kept.shape, jnp.uint8),
        scales,
        scales,
        _COUNTERS,
    ]
    given = *_arrays(*operands[:3]), kept, operands.row_weights.astype(jnp.float32)
    attributes |= {"power_of_two": POWER_OF_TWO[format]}
    # The gradient overwrites the residual.
    dpre, codes, scales, sums, _ = native.call(
        "matmul_encoded_grad", given, outs, input_output_aliases={5: 0}, **attributes
    )
    return Outputs(
        dpre,
        row_weight_gradients=jnp.sum(sums, axis=0),
        codes=ScaledRows(codes, {"block": scales.T}, format, dpre.dtype),
    )


_COUNTERS = jax.ShapeDtypeStruct((2,), jnp.int32)


def _arrays(rows, w, group_sizes):
    """The operands of a product of codes. Gate and up are matrices side by side."""
    experts, parts, n, k = w.codes.shape
    w_scales = wide_scales(w.scales)
    w_scales = w_scales.reshape(experts, -1, w_scales.shape[-1])
    return rows.codes, wide_scales(rows.scales).T, w.codes.reshape(experts, parts * n, k), w_scales, group_sizes


def _activation_grad(problem, tile, operands, attributes) -> Outputs:
    residual, kept = problem.epilogue.residual, operands.residual
    num_rows, width, activation = problem.num_rows, problem.k, kernel_activation(problem.epilogue.activation)
    assert activation is not None, "supports refuses an activation that the epilogues do not have"
    attributes |= {"beta": activation.beta, "linear_beta": activation.linear_beta}
    outs = [
        jax.ShapeDtypeStruct(kept.shape, kept.dtype),
        jax.ShapeDtypeStruct((num_rows if residual == "pre" else 0, width), kept.dtype),
        jax.ShapeDtypeStruct((-(-width // tile.columns), num_rows), jnp.float32),
    ]
    given = *tables(operands), kept, operands.row_weights.astype(jnp.float32)
    # The gradient overwrites the residual.
    (dpre, hidden, sums), lhs = call(
        "matmul_activation_grad", outs, operands.lhs, given, attributes, input_output_aliases={3: 0}
    )
    return Outputs(
        dpre,
        hidden=hidden if residual == "pre" else None,
        row_weight_gradients=jnp.sum(sums, axis=0),
        lhs=lhs,
    )


def _wgrad(problem, operands, attributes) -> Outputs:
    lhs, rhs = operands.lhs, operands.rhs
    attributes |= {
        "first_column": _first_column(lhs),
        "gathered_lhs": isinstance(lhs, GatheredRows),
        "gathered_rhs": isinstance(rhs, GatheredRows),
    }
    outs = [jax.ShapeDtypeStruct((problem.num_experts, problem.k, problem.n), lhs.dtype)]
    of_lhs = attributes["gathered_lhs"]
    (out,), rows = call("wgrad", outs, lhs if of_lhs else rhs, tables(operands), attributes)
    return Outputs(out, lhs=rows) if of_lhs else Outputs(out, rhs=rows)


def _first_column(rows) -> int:
    return rows.matrix.shape[1] - rows.width if isinstance(rows, LastColumns) else 0
