"""One grouped matmul, as far as it is known before it runs: what backends are asked about."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from jax_latent_moe.device import default_device, is_hopper
from jax_latent_moe.grouped_matmul.fused import FusedActivation

Contraction = Literal["fwd", "dgrad", "wgrad"]
HOPPER_DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One grouped matmul, as far as it is known before it runs.

    Attributes:
        contraction: "fwd" is rows x w, "dgrad" is rows x w^T, "wgrad" is rows^T x rows, each per expert.
        num_rows: R, rows in all.
        num_experts: E, experts with rows or without.
        in_features: K of the weight [E, K, N].
        out_features: N of the weight [E, K, N].
        dtype: type of rows and weights.
        platform: "cpu", "gpu" or "tpu".
        device_kind: the device's own name, such as "NVIDIA H100 80GB HBM3".
        activation: fused into the product: with "fwd" its value, with "dgrad" its gradient. None for a plain one.
    """

    contraction: Contraction
    num_rows: int
    num_experts: int
    in_features: int
    out_features: int
    dtype: str
    platform: str
    device_kind: str
    activation: FusedActivation | None = None


def problem(
    contraction: Contraction,
    num_rows: int,
    w_shape: tuple[int, int, int],
    dtype,
    activation: FusedActivation | None = None,
) -> Problem:
    """The `Problem` that a call on the default device poses: what `explain` and `select` ask for."""
    return Problem(contraction, num_rows, *w_shape, jnp.dtype(dtype).name, *default_device(), activation)


def hopper_refusal(asked: Problem) -> str | None:
    """None, or what keeps kernels for 16-bit types on Hopper GPUs from running the asked."""
    if asked.platform != "gpu" or not is_hopper(asked.device_kind):
        return f"its kernels are for NVIDIA Hopper GPUs (H100, H200), not {asked.device_kind!r}."
    if asked.dtype not in HOPPER_DTYPES:
        return f"its kernels multiply {' and '.join(HOPPER_DTYPES)}, not {asked.dtype}."
    return None
