"""The `pallas` backend: Mosaic GPU kernels for Hopper. Pallas itself is imported when a kernel is built."""

import functools

from jax import custom_batching

from jax_latent_moe.config import PallasBackend
from jax_latent_moe.device import default_device, num_sms
from jax_latent_moe.grouped_matmul.fused import fusing_refusal
from jax_latent_moe.grouped_matmul.operands import gathered
from jax_latent_moe.grouped_matmul.pallas_sm90 import tiles as pallas_tiles
from jax_latent_moe.grouped_matmul.problem import hopper_refusal
from jax_latent_moe.grouped_matmul.tuning.table import Choice

FEATURE_MULTIPLE = 64


class Pallas:
    """The `pallas` backend: see `PallasBackend` for its settings."""

    def __init__(self, config: PallasBackend):
        self.config = config

    def supports(self, problem) -> str | None:
        """None, or what keeps the kernels from running the problem."""
        if reason := hopper_refusal(problem):
            return reason
        for name in ("in_features", "out_features"):
            if (size := getattr(problem, name)) % FEATURE_MULTIPLE or not size:
                return f"{name}={size} is not a multiple of {FEATURE_MULTIPLE}, the columns of one swizzled block."
        for name in ("num_rows", "num_experts"):
            if getattr(problem, name) == 0:
                return f"{name}=0 leaves its kernels nothing to do."
        if problem.activation is not None:
            return _fused_refusal(problem, self.config.fuse)
        return None

    def tile(self, problem) -> Choice:
        """See `Backend.tile`."""
        w_shape = problem.num_experts, problem.in_features, problem.out_features
        if problem.activation is not None:
            tile = pallas_tiles.choose_fused(problem.contraction, problem.num_rows, w_shape, problem.activation)
            return Choice(tile, "a heuristic: fused products are not tuned")
        return self._tile(problem.contraction, problem.num_rows, w_shape, problem.device_kind)

    def candidates(self, problem) -> tuple[PallasBackend, ...]:
        """See `Backend.candidates`."""
        return pallas_tiles.candidates(problem.contraction)

    def matmul(self, rows, w, group_sizes, *, transpose_w):
        """See `Backend.matmul`."""
        from jax_latent_moe.grouped_matmul.pallas_sm90.matmul import rows_w

        contraction = "dgrad" if transpose_w else "fwd"
        tile = self._tile(contraction, rows.shape[0], w.shape, default_device()[1]).tile
        return _call(rows_w, gathered(rows), w, group_sizes, transpose_w=transpose_w, tile=tile)

    def keeps_gate(self, activation) -> bool:
        """See `FusingBackend.keeps_gate`."""
        return False

    def matmul_activation(self, rows, w, group_sizes, *, activation, keep_pre):
        """See `FusingBackend.matmul_activation`."""
        from jax_latent_moe.grouped_matmul.pallas_sm90.fused import matmul_activation

        tile = pallas_tiles.choose_fused("fwd", rows.shape[0], w.shape, activation)
        arrays = gathered(rows), w, group_sizes
        return _call(matmul_activation, *arrays, activation=activation, keep_pre=keep_pre, tile=tile)

    def matmul_activation_grad(self, dout, w, group_sizes, kept, row_weights, *, activation):
        """See `FusingBackend.matmul_activation_grad`."""
        from jax_latent_moe.grouped_matmul.pallas_sm90.fused import matmul_activation_grad

        tile = pallas_tiles.choose_fused("dgrad", dout.shape[0], w.shape, activation)
        dout = gathered(dout)
        arrays = dout, w, group_sizes, kept, row_weights
        return *_call(matmul_activation_grad, *arrays, activation=activation, tile=tile), dout

    def outer(self, rows, dout, group_sizes):
        """See `Backend.outer`."""
        from jax_latent_moe.grouped_matmul.pallas_sm90.wgrad import wgrad

        shape = (group_sizes.shape[0], rows.shape[1], dout.shape[1])
        tile = self._tile("wgrad", rows.shape[0], shape, default_device()[1]).tile
        rows, dout = gathered(rows), gathered(dout)
        return _call(wgrad, rows, dout, group_sizes, tile=tile), rows, dout

    def _tile(self, contraction, num_rows, w_shape, device):
        given = self.config.wgrad_tile if contraction == "wgrad" else self.config.matmul_tile
        if given is not None:
            return Choice(given, "the config")
        return pallas_tiles.choose(contraction, num_rows, w_shape, device)


def _call(function, *arrays, **settings):
    """Under vmap one call after the other: Pallas would add an axis to references, which the kernels do not expect."""
    call = functools.partial(function, num_sms=num_sms(), **settings)
    return custom_batching.sequential_vmap(call)(*arrays)


def _fused_refusal(problem, fuse) -> str | None:
    half = problem.out_features // 2
    if problem.activation.gated and problem.contraction == "fwd" and half % FEATURE_MULTIPLE:
        return (
            f"half of out_features={problem.out_features} is not a multiple of {FEATURE_MULTIPLE}: pad it, or let "
            "fuse='never' leave the activation to XLA."
        )
    return fusing_refusal("pallas", fuse, problem.contraction, problem.activation.name)
