"""The `pallas` backend: Mosaic GPU kernels for Hopper. Pallas itself is imported when a kernel is built."""

import functools

from jax import custom_batching
from jax.export import is_symbolic_dim

from jax_latent_moe.grouped_matmul.backend import Backend
from jax_latent_moe.grouped_matmul.operands import Outputs
from jax_latent_moe.grouped_matmul.pallas_sm90 import tiles as pallas_tiles
from jax_latent_moe.grouped_matmul.pallas_sm90.config import (
    PallasFp8Tile,
    PallasMatmulTile,
    PallasWgradTile,
    PallasWidenTile,
)
from jax_latent_moe.grouped_matmul.pallas_sm90.widening import WIDENINGS
from jax_latent_moe.grouped_matmul.sm90 import (
    DTYPES,
    both_fp8,
    fp8_refusal,
    fuse_refusal,
    kernel_activation,
    refusal,
    size_refusal,
    widen_refusal,
)
from jax_latent_moe.varying import varying

FEATURE_MULTIPLE = 64
"""Columns of one swizzled block."""

CODES_MULTIPLE = 128
"""K of a weight in codes is a multiple of this: Pallas of JAX 0.11 loads whole swizzled blocks, of 128 codes here."""

# Activations that were faster inside of a product when they were measured (benchmarks/results/profiles).
FASTER = {"fwd": ("relu2",), "dgrad": ()}


class Pallas(Backend):
    """The `pallas` backend: see `PallasBackend` for its settings."""

    interpret = None
    """Parameters of Pallas' GPU interpreter, for a subclass that runs the kernels on a CPU."""

    def supports(self, problem):
        """None, or the reason why the kernels cannot run the problem."""
        if both_fp8(problem):
            reason = _fp8_refusal(problem)
        elif _widens(problem):
            reason = _widen_refusal(problem)
        else:
            reason = refusal(problem, FEATURE_MULTIPLE)
        if reason:
            return reason
        if is_symbolic_dim(problem.num_rows):
            return (
                f"num_rows={problem.num_rows} is symbolic, but its kernels are compiled for one number of rows: use "
                "CutlassBackend() or XlaBackend()."
            )
        for name in ("num_rows", "num_experts"):
            if getattr(problem, name) == 0:
                return f"{name}=0 must be at least 1."
        if problem.epilogue is None:
            return None
        if problem.epilogue.residual == "gate_hidden":
            return "its epilogues keep pre-activations or hidden rows, not gate and hidden rows side by side."
        if problem.epilogue.encodes is not None:
            return f"its epilogues do not encode hidden rows in {problem.epilogue.encodes}."
        return fuse_refusal(problem, self.config.fuse, FASTER)

    def tiles(self, problem):
        """See `Backend.tiles`."""
        return pallas_tiles.tiles(problem)

    def has_tile(self, problem, tile):
        """See `Backend.has_tile`: plain kernels are built for any tile."""
        if _widens(problem):
            return pallas_tiles.widen_tile_fits(tile, problem)
        return problem.epilogue is None or super().has_tile(problem, tile)

    def given_tile(self, problem):
        """See `Backend.given_tile`."""
        if problem.epilogue is not None:
            return None
        if both_fp8(problem):
            return self.config.fp8_tile
        if _widens(problem):
            return self.config.widen_tile
        return self.config.wgrad_tile if problem.contraction == "wgrad" else self.config.matmul_tile

    def tile_type(self, problem):
        """See `Backend.tile_type`."""
        if both_fp8(problem):
            return PallasFp8Tile
        if _widens(problem):
            return PallasWidenTile
        return PallasWgradTile if problem.contraction == "wgrad" else PallasMatmulTile

    def insists(self, epilogue):
        """See `Backend.insists`: with fuse="always", an activation or a bias that no kernel has is an error."""
        return self.config.fuse == "always" and (epilogue.bias or kernel_activation(epilogue.activation) is None)

    def run(self, problem, tile, operands):
        """See `Backend.run`."""
        settings = {"tile": tile, "num_sms": problem.device.num_sms, "interpret": self.interpret}
        lhs, rhs, group_sizes, kept, row_weights = operands
        if both_fp8(problem):
            return _fp8(problem, lhs, rhs, group_sizes, settings)
        if _widens(problem):
            from jax_latent_moe.grouped_matmul.pallas_sm90.widen import matmul_widened

            return Outputs(_call(matmul_widened, lhs, rhs, group_sizes, **settings))
        if problem.contraction == "wgrad":
            from jax_latent_moe.grouped_matmul.pallas_sm90.wgrad import wgrad

            return Outputs(_call(wgrad, lhs, rhs, group_sizes, **settings))
        if problem.epilogue is None:
            from jax_latent_moe.grouped_matmul.pallas_sm90.matmul import matmul

            return Outputs(_call(matmul, lhs, rhs, group_sizes, transpose_w=problem.contraction == "dgrad", **settings))
        from jax_latent_moe.grouped_matmul.pallas_sm90 import fused

        residual = problem.epilogue.residual
        settings |= {"activation": kernel_activation(problem.epilogue.activation), "residual": residual}
        if problem.contraction == "fwd":
            pre, hidden = _call(fused.matmul_activation, lhs, rhs, group_sizes, **settings)
            return Outputs(hidden, residual=hidden if residual == "hidden" else pre)
        arrays = lhs, rhs, group_sizes, kept, row_weights
        dpre, hidden, row_weight_gradients = _call(fused.matmul_activation_grad, *arrays, **settings)
        return Outputs(dpre, hidden=hidden, row_weight_gradients=row_weight_gradients)


def _fp8_refusal(problem):
    reason = fp8_refusal(problem, DTYPES, CODES_MULTIPLE, FEATURE_MULTIPLE)
    return reason or size_refusal(problem, FEATURE_MULTIPLE)


def _widens(problem):
    return problem.lhs.format in DTYPES and problem.rhs.format in WIDENINGS


def _widen_refusal(problem):
    if reason := widen_refusal(problem, CODES_MULTIPLE, FEATURE_MULTIPLE):
        return reason
    if problem.epilogue is not None:
        return "its kernel that widens codes has no epilogue: XLA computes the activation."
    if not pallas_tiles.tiles(problem):
        return f"the scales of K={problem.k} in {problem.rhs.format} do not fit the shared memory."
    return None


def _fp8(problem, rows, w, group_sizes, settings):
    from jax_latent_moe.grouped_matmul.pallas_sm90.fp8 import matmul_fp8

    if problem.epilogue is None:
        (out,) = _call(matmul_fp8, rows, w, group_sizes, **settings)
        return Outputs(out)
    residual, activation = problem.epilogue.residual, kernel_activation(problem.epilogue.activation)
    *pre, hidden = _call(matmul_fp8, rows, w, group_sizes, activation=activation, residual=residual, **settings)
    return Outputs(hidden, residual=hidden if residual == "hidden" else pre[0] if pre else None)


def _call(function, *arrays, **settings):
    """Runs a kernel. Under vmap, calls run in turn, because Pallas would add an axis that the kernels do not expect.

    The results vary over the mapped axes that any array varies over. Pallas types them as equal on all devices.
    """
    return varying(custom_batching.sequential_vmap(functools.partial(function, **settings))(*arrays), arrays)
