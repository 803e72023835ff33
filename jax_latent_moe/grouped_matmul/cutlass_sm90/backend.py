"""The `cutlass` backend: compiled Hopper kernels behind XLA FFI custom calls (custom_calls/)."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_latent_moe.config import CutlassBackend, CutlassTile
from jax_latent_moe.grouped_matmul.cutlass_sm90 import tiles as cutlass_tiles
from jax_latent_moe.grouped_matmul.fused import ACTIVATIONS, FusedActivation, fusing_refusal
from jax_latent_moe.grouped_matmul.operands import GatheredRows, LastColumns, gathered
from jax_latent_moe.grouped_matmul.problem import Problem, hopper_refusal, problem
from jax_latent_moe.grouped_matmul.tuning.table import Choice
from jax_latent_moe.native import library

FEATURE_MULTIPLE = 8
MAX_ROWS = 2**31 - 256
FEW_PRODUCTS = 1024
"""Products of each gathered element below which a kernel would wait for its rows: they are gathered beforehand.

Measured at 768, where it waited, and at 1536, where it did not (benchmarks/results/profiles/h200-2026-11-27.md).
"""


KEEPS_GATE = ("swiglu", "geglu", "geglu_tanh")
"""Gated activations of which gate and hidden rows are kept side by side (custom_calls/src/instance.h).

They are as many bytes as the pre-activation, and neither pass has to write hidden rows beside them.
"""


class Cutlass:
    """The `cutlass` backend: see `CutlassBackend` for its settings."""

    def __init__(self, config: CutlassBackend):
        self.config = config

    def supports(self, problem: Problem) -> str | None:
        """None, or what keeps the kernels from running the problem."""
        if reason := hopper_refusal(problem):
            return reason
        for name in ("in_features", "out_features"):
            if (size := getattr(problem, name)) % FEATURE_MULTIPLE or not size:
                return (
                    f"{name}={size} is not a positive multiple of {FEATURE_MULTIPLE}: rows are read 16 bytes at a time."
                )
        if problem.num_experts == 0:
            return "num_experts=0 must be at least 1."
        if problem.num_rows >= MAX_ROWS:
            return f"num_rows={problem.num_rows} must be below {MAX_ROWS}: tiles count rows in 32 bits."
        if _halves(problem) % FEATURE_MULTIPLE:
            return (
                f"half of out_features={problem.out_features} is not a multiple of {FEATURE_MULTIPLE}: pad it, or let "
                "fuse='never' leave the activation to XLA."
            )
        if library().missing:
            return library().missing
        if problem.activation is not None and (
            reason := fusing_refusal("cutlass", self.config.fuse, problem.contraction, problem.activation.name)
        ):
            return reason
        return cutlass_tiles.refusal(problem, self._given(problem))

    def tile(self, problem) -> Choice:
        """See `Backend.tile`."""
        if given := self._given(problem):
            return Choice(given, "the config")
        return cutlass_tiles.choose(problem)

    def candidates(self, problem) -> tuple[CutlassBackend, ...]:
        """See `Backend.candidates`."""
        tiles = cutlass_tiles.compiled(problem)
        if problem.contraction == "wgrad":
            return tuple(CutlassBackend(wgrad_tile=tile) for tile in tiles)
        return tuple(CutlassBackend(matmul_tile=tile) for tile in tiles)

    def matmul(self, rows, w, group_sizes, *, transpose_w):
        """See `Backend.matmul`."""
        tile = self._tile("dgrad" if transpose_w else "fwd", rows, w.shape)
        out = jax.ShapeDtypeStruct((rows.shape[0], w.shape[1 if transpose_w else 2]), rows.dtype)
        # No layer names rows x w^T's rows in a table: that its kernels gather them was not tried.
        rows = gathered(rows) if transpose_w else _for_kernel(rows, tile, out.shape[1])
        attributes = {"transpose_w": transpose_w, "first_column": _first_column(rows)}
        attributes |= _matmul_attributes(tile, rows)
        (out,), _ = _call_gathering("matmul", [out], rows, (_table(rows), w, group_sizes), attributes)
        return out

    def outer(self, rows, dout, group_sizes):
        """See `Backend.outer`."""
        shape = (group_sizes.shape[0], rows.shape[1], dout.shape[1])
        tile = self._tile("wgrad", rows, shape)
        rows, dout = _for_kernel(rows, tile, dout.shape[1]), _for_kernel(dout, tile, rows.shape[1])
        of_rows = isinstance(rows, GatheredRows)
        dout = gathered(dout) if of_rows else dout  # a kernel gathers the rows of one operand
        attributes = _tile_attributes(tile) | {
            "cluster_rows": np.int32(tile.cluster_rows),
            "cluster_columns": np.int32(tile.cluster_columns),
            "first_column": _first_column(rows),
            "gathered_rows": of_rows,
            "gathered_dout": isinstance(dout, GatheredRows),
        }
        outs, operands = [jax.ShapeDtypeStruct(shape, rows.dtype)], (_table(rows), _table(dout), group_sizes)
        (out,), given = _call_gathering("wgrad", outs, rows if of_rows else dout, operands, attributes)
        return (out, given, dout) if of_rows else (out, rows, given)

    def keeps_gate(self, activation) -> bool:
        """See `FusingBackend.keeps_gate`."""
        return activation.name in KEEPS_GATE

    def matmul_activation(self, rows, w, group_sizes, *, activation, keep_pre):
        """See `FusingBackend.matmul_activation`."""
        tile = self._tile("fwd", rows, w.shape, activation)
        width = w.shape[2] // (2 if activation.gated else 1)
        in_one, num_rows = keep_pre and self.keeps_gate(activation), rows.shape[0]
        outs = [
            jax.ShapeDtypeStruct((num_rows if keep_pre else 0, w.shape[2]), rows.dtype),
            jax.ShapeDtypeStruct((0 if in_one else num_rows, width), rows.dtype),
        ]
        rows = _for_kernel(rows, tile, w.shape[2])
        attributes = _activation_attributes(activation) | {"keep_pre": keep_pre} | _matmul_attributes(tile, rows)
        operands = _table(rows), w, group_sizes
        (pre, hidden), _ = _call_gathering("matmul_activation", outs, rows, operands, attributes)
        return pre if keep_pre else None, None if in_one else hidden

    def matmul_activation_grad(self, dout, w, group_sizes, kept, row_weights, *, activation):
        """See `FusingBackend.matmul_activation_grad`."""
        tile = self._tile("dgrad", dout, w.shape, activation)
        num_rows, width = dout.shape[0], w.shape[1]
        column_tiles = -(-width // tile.columns)
        has_hidden = activation.keeps_hidden or self.keeps_gate(activation)
        outs = [
            jax.ShapeDtypeStruct(kept.shape, kept.dtype),
            jax.ShapeDtypeStruct((0 if has_hidden else num_rows, width), kept.dtype),
            jax.ShapeDtypeStruct((column_tiles, num_rows), jnp.float32),
        ]
        dout = _for_kernel(dout, tile, width)
        operands = _table(dout), w, group_sizes, kept, row_weights.astype(jnp.float32)
        attributes = _activation_attributes(activation) | _matmul_attributes(tile, dout)
        (dpre, hidden, sums), dout = _call_gathering(
            "matmul_activation_grad", outs, dout, operands, attributes, input_output_aliases={3: 0}
        )
        return dpre, None if has_hidden else hidden, jnp.sum(sums, axis=0), dout

    def _given(self, problem):
        if problem.activation is not None:
            return None
        return self.config.wgrad_tile if problem.contraction == "wgrad" else self.config.matmul_tile

    def _tile(self, contraction, rows, w_shape, activation=None) -> CutlassTile:
        return self.tile(problem(contraction, rows.shape[0], w_shape, rows.dtype, activation)).tile


def _halves(problem) -> int:
    gated = problem.activation is not None and problem.activation.gated
    return problem.out_features // 2 if gated and problem.contraction == "fwd" else 0


def _for_kernel(rows, tile, products):
    """Rows as the tile's kernel is handed them, which multiplies each of their elements so often."""
    before = tile.rows <= cutlass_tiles.SMALL_TILE or products < FEW_PRODUCTS or not rows.shape[0]
    return gathered(rows) if before and isinstance(rows, GatheredRows) else rows


def _table(rows):
    if isinstance(rows, LastColumns):
        return rows.matrix
    return rows.table if isinstance(rows, GatheredRows) else rows


def _first_column(rows) -> np.int32:
    return np.int32(rows.matrix.shape[1] - rows.width if isinstance(rows, LastColumns) else 0)


def _call_gathering(target, outs, rows, operands, attributes, **options):
    """The results of a target, and rows: it gathers those that are not gathered yet, whose table `operands` has."""
    named = isinstance(rows, GatheredRows)
    row_ids, weights = (rows.row_ids, rows.weights) if named else (jnp.zeros(0, jnp.int32), None)
    weights = jnp.zeros(0) if weights is None else weights
    # Of gathered rows the kernel counts how many are there, of all and of each 64, and which it took from either end.
    counters = 5 + -(-rows.shape[0] // 64) if named else 2
    room = jax.ShapeDtypeStruct(rows.shape if named else (0, 0), rows.dtype)
    outs = [*outs, room, jax.ShapeDtypeStruct((counters,), jnp.int32)]
    call = jax.ffi.ffi_call(f"latent_moe_{target}", outs, vmap_method="sequential", **options)
    *results, room, _ = call(*operands, row_ids, weights.astype(jnp.float32), **attributes)
    return results, room if named else rows


def _tile_attributes(tile: CutlassTile) -> dict:
    sizes = {"tile_rows": tile.rows, "tile_columns": tile.columns, "stages": tile.stages}
    return {name: np.int32(size) for name, size in sizes.items()}


def _matmul_attributes(tile: CutlassTile, rows) -> dict:
    return _tile_attributes(tile) | {
        "gathered": isinstance(rows, GatheredRows),
        "cluster": np.int32(tile.cluster_columns),
        "rows_first": tile.rows_first,
    }


def _activation_attributes(activation: FusedActivation) -> dict:
    return {
        "activation": np.int32(ACTIVATIONS.index(activation.name) + 1),
        "beta": np.float32(activation.beta),
        "linear_beta": np.float32(activation.linear_beta),
    }
