"""The Pallas kernel with an activation in its epilogue: the value after rows x w, the gradient after rows x w^T."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jax_latent_moe.activations import Residual
from jax_latent_moe.grouped_matmul.pallas_sm90.activations import value_and_slopes
from jax_latent_moe.grouped_matmul.pallas_sm90.config import PallasMatmulTile
from jax_latent_moe.grouped_matmul.pallas_sm90.epilogues import Activation, ActivationGradient
from jax_latent_moe.grouped_matmul.pallas_sm90.matmul import multiply, pad_rows
from jax_latent_moe.grouped_matmul.pallas_sm90.mgpu import COLUMN_BLOCK, CONSUMERS
from jax_latent_moe.grouped_matmul.pallas_sm90.schedule import group_bounds
from jax_latent_moe.grouped_matmul.sm90 import KernelActivation


def matmul_activation(
    rows: Float[Array, "r k"],
    w: Float[Array, "e k n"],
    group_sizes: Int[Array, " e"],
    *,
    activation: KernelActivation,
    residual: Residual | None,
    tile: PallasMatmulTile,
    num_sms: int,
    interpret=None,
) -> tuple[Float[Array, "r n"] | None, Float[Array, "r m"]]:
    """The activation of rows x w. K and N are multiples of 64, and so is N / 2 if the activation is gated.

    Args:
        rows: [R, K], bfloat16 or float16, sorted by expert.
        w: [E, K, N]. If gated, N = 2 M and the gate half comes first.
        group_sizes: [E], on the device.
        activation: the activation, applied to the pre-activation rounded to the dtype of rows.
        residual: "pre" stores the pre-activation for the backward pass.
        tile: tile shape and schedule, with at least 2 store_buffers. If gated, 128 columns and at least 3.
        num_sms: SMs to run on.
        interpret: parameters of Pallas' GPU interpreter, to run on a CPU.

    Returns:
        The pre-activation [R, N], or None, and its activation [R, M], in the dtype of rows.
    """
    num_rows, out_features = rows.shape[0], w.shape[2]
    width = out_features // (2 if activation.gated else 1)
    *pre, hidden = multiply(
        Activation,
        rows,
        w,
        group_sizes,
        out_types=[
            jax.ShapeDtypeStruct((num_rows, size), rows.dtype)
            for size in ((out_features, width) if residual == "pre" else (width,))
        ],
        activation=activation,
        transpose_w=False,
        tile=tile,
        num_sms=num_sms,
        interpret=interpret,
    )
    return pre[0] if pre else None, hidden


def matmul_activation_grad(
    dout: Float[Array, "r n"],
    w: Float[Array, "e m n"],
    group_sizes: Int[Array, " e"],
    kept: Float[Array, "r p"],
    row_weights: Float[Array, " r"],
    *,
    activation: KernelActivation,
    residual: Residual,
    tile: PallasMatmulTile,
    num_sms: int,
    interpret=None,
) -> tuple[Float[Array, "r p"], Float[Array, "r m"] | None, Float[Array, " r"]]:
    """The activation's gradient of dout x w^T; M and N are multiples of 64.

    Args:
        dout: [R, N], bfloat16 or float16, sorted by expert.
        w: [E, M, N].
        group_sizes: [E], on the device.
        kept: the residual in the dtype of dout: the pre-activation [R, M], gated [R, 2 M], or the hidden rows [R, M].
        row_weights: [R].
        activation: the activation.
        residual: the kind of `kept`, "pre" or "hidden".
        tile: tile shape and schedule. If gated, at least 2 store_buffers.
        num_sms: SMs to run on.
        interpret: parameters of Pallas' GPU interpreter, to run on a CPU.

    Returns:
        A tuple of three:
            The gradient of the pre-activation times row_weights, in the shape of kept and the dtype of dout.
            The hidden rows [R, M] times row_weights, computed outside of the kernel; None if kept holds them.
            The gradient of row_weights [R] in float32, summed in a fixed order.
    """
    num_rows, width = dout.shape[0], w.shape[1]
    # A cluster may compute tiles beyond the last column. Their sums are zero and are counted here.
    column_tiles = -(-width // (tile.columns * tile.cluster)) * tile.cluster
    num_parts = 2 if activation.gated else 1
    # Blocks of the residual that are in shared memory at once.
    sets = min(tile.store_buffers // num_parts, tile.columns // COLUMN_BLOCK)
    dpre, sums = multiply(
        functools.partial(ActivationGradient, residual),
        dout,
        w,
        group_sizes,
        operands=[pad_rows(kept), pad_rows(row_weights.astype(jnp.float32))],
        out_types=[
            jax.ShapeDtypeStruct(kept.shape, dout.dtype),
            jax.ShapeDtypeStruct((column_tiles, num_rows), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((CONSUMERS, 2, tile.rows), jnp.float32),
            plgpu.Barrier(num_arrivals=num_parts, num_barriers=CONSUMERS * sets),
            plgpu.Barrier(num_barriers=CONSUMERS),
        ],
        activation=activation,
        transpose_w=True,
        tile=tile,
        num_sms=num_sms,
        interpret=interpret,
    )
    # The kernel writes no sums of padding rows.
    owned = jnp.arange(num_rows) < group_bounds(group_sizes, num_rows)[1][-1]
    drow_weights = jnp.where(owned, jnp.sum(sums, axis=0), 0)
    if residual == "hidden":
        return dpre, None, drow_weights
    hidden, _ = value_and_slopes(activation, jnp.split(kept.astype(jnp.float32), num_parts, axis=1))
    weighted = row_weights[:, None].astype(jnp.float32) * hidden
    return dpre, jnp.where(owned[:, None], weighted, 0).astype(dout.dtype), drow_weights
