"""Floating-point operations of a model and the peak of a GPU. Their quotient is the MFU of a run."""

from typing import Any

from examples.train.mlp import dense_width
from examples.train.model import LanguageModel
from jax_latent_moe.cost import matmul_flops_per_token

PEAKS = {
    "H100 80GB HBM3": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""Dense bfloat16 operations a second, from the datasheets. A key is part of JAX's name of the device."""


def flops_per_token(model: LanguageModel) -> int:
    """Operations for one token in training: three times the matrix products of a forward pass.

    Causal attention counts half of its square. Recomputation does not count.
    """
    d, context = model.model.hidden_size, model.model.context
    mlp = matmul_flops_per_token(model.moe) if model.moe else 4 * d * dense_width(model.model)
    first = 4 * d * dense_width(model.model)
    attention = 8 * d * d + 2 * context * d
    layers = model.model.layers
    return 3 * (layers * attention + first + (layers - 1) * mlp + 2 * d * model.vocabulary)


def peak_flops(device: Any) -> float | None:
    """The most operations a second of a device. None if `PEAKS` does not list it; no CPU is listed."""
    if device.platform != "gpu":
        return None
    names = sorted((name for name in PEAKS if name in device.device_kind), key=len)
    return PEAKS[names[-1]] if names else None
