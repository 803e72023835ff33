"""Libraries of compiled kernels written by hand: what the package chooses and calls can be tested without a GPU."""

from jax_latent_moe import LatentMoEConfig, native
from jax_latent_moe.activations import BoundActivation
from jax_latent_moe.device import Device
from jax_latent_moe.grouped_matmul import Epilogue
from jax_latent_moe.plan.kernels import KERNELS

H200, H100 = Device("gpu", "NVIDIA H200"), Device("gpu", "NVIDIA H100 80GB HBM3")
A100, CPU = Device("gpu", "NVIDIA A100-SXM4-80GB"), Device("cpu", "cpu")

MAX_EXPERTS = 896
MATMUL = ("128x192x5.1x2", "192x128x5.1x2", "128x128x6.1x2", "64x192x6.1x1", "64x128x8.1x1")
WGRAD = ("128x192x4.1x2", "192x128x4.2x1", "128x128x6.1x2")
RESIDUAL = {
    "relu2": "hidden",
    "gelu": "pre",
    "gelu_tanh": "pre",
    "swiglu": "gate_hidden",
    "geglu": "gate_hidden",
    "geglu_tanh": "gate_hidden",
    "situ_glu": "pre",
}
"""The residual that the kernels of each activation keep, and compute the gradient from."""

PLAIN = tuple(
    f"sm90.{contraction}.{format}.{tile}"
    for format in ("bf16", "f16")
    for contraction, tiles in (("fwd", MATMUL), ("dgrad", MATMUL), ("wgrad", WGRAD))
    for tile in tiles
)
FUSED = tuple(
    f"sm90.{contraction}.bf16.{activation}:{residual}.128x{columns}x5.1x2"
    for activation, residual in RESIDUAL.items()
    for contraction, columns in (("fwd", 192), ("dgrad", 128))
)


def library(*names: str, max_experts: int = MAX_EXPERTS, **more: int) -> native.Library:
    """A library of these kernels, each for as many experts."""
    return native.Library(dict.fromkeys(names, max_experts) | more, None)


CODES = tuple(name for name, _ in KERNELS if ".e4m3." in name)
"""The kernels of codes that are compiled."""

WIDENING = tuple(name for name, _ in KERNELS if ".bf16_codes." in name)
"""The kernels that widen codes of weights."""

WHOLE = library(*PLAIN, *FUSED, *CODES, *WIDENING)
"""Kernels of every contraction, activation and size of tile."""


def layer_of(name: str) -> LatentMoEConfig:
    """A layer with the activation that kernels call so."""
    approximate = name.endswith("_tanh")
    return LatentMoEConfig(8, 4, 8, 2, 8, activation=name.removesuffix("_tanh"), gelu_approximate=approximate)


def bound_activation(name: str) -> BoundActivation:
    """The activation that kernels call so."""
    return layer_of(name).bound_activation


def epilogue_of(name: str) -> Epilogue:
    """The epilogue of its kernels."""
    return Epilogue(bound_activation(name), RESIDUAL[name])
