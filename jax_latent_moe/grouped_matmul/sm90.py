"""What the two backends with Hopper kernels share: what they refuse, and the activations that their epilogues know."""

import dataclasses
from typing import Literal

from jax_latent_moe.activations import BoundActivation
from jax_latent_moe.grouped_matmul.problem import Problem

Fuse = Literal["measured", "always", "never"]
FUSE = ("measured", "always", "never")
DTYPES = ("bfloat16", "float16")
# The epilogues' names for activations of the package, by name and gelu_approximate.
_EPILOGUES = {
    ("relu2", False): "relu2",
    ("gelu", False): "gelu",
    ("gelu", True): "gelu_tanh",
    ("swiglu", False): "swiglu",
    ("geglu", False): "geglu",
    ("geglu", True): "geglu_tanh",
    ("situ_glu", False): "situ_glu",
}
KERNEL_ACTIVATIONS = tuple(_EPILOGUES.values())


@dataclasses.dataclass(frozen=True)
class KernelActivation:
    """An activation as an epilogue knows it.

    Attributes:
        name: one of KERNEL_ACTIVATIONS.
        gated: whether it reads a gate and an up half.
        beta: situ_glu's bound of the gate; 0 otherwise.
        linear_beta: situ_glu's bound of the up half; 0 for none.
    """

    name: str
    gated: bool
    beta: float = 0.0
    linear_beta: float = 0.0


def kernel_activation(activation: BoundActivation) -> KernelActivation | None:
    """An activation of the registry as the epilogues know it; None where they do not."""
    parameters = dict(activation.parameters)
    name = _EPILOGUES.get((activation.name, bool(parameters.get("gelu_approximate"))))
    if name is None:
        return None
    beta, linear_beta = parameters.get("situ_beta") or 0.0, parameters.get("situ_linear_beta") or 0.0
    return KernelActivation(name, activation.gated, beta, linear_beta)


def refusal(problem: Problem, feature_multiple: int) -> str | None:
    """None, or what keeps 16-bit kernels for Hopper GPUs from running the problem.

    Args:
        problem: the grouped matmul.
        feature_multiple: what K and N, and half of N where an fwd with a gated activation splits it, must be multiples
            of.
    """
    if problem.device.architecture != "sm90":
        return f"its kernels are for NVIDIA Hopper GPUs (H100, H200), not {problem.device.kind!r}."
    formats = {operand.format for operand in (problem.lhs, problem.rhs, problem.out)}
    if len(formats) > 1 or not formats <= set(DTYPES):
        return (
            f"its kernels multiply {' and '.join(DTYPES)}, all operands alike, not {problem.lhs.format} x "
            f"{problem.rhs.format} to {problem.out.format}."
        )
    for name in ("k", "n"):
        if (size := getattr(problem, name)) % feature_multiple or not size:
            return f"{name}={size} is not a positive multiple of {feature_multiple}."
    epilogue = problem.epilogue
    if epilogue and epilogue.activation.gated and problem.contraction == "fwd" and problem.n // 2 % feature_multiple:
        return (
            f"half of n={problem.n} is not a multiple of {feature_multiple}: pad it, or let fuse='never' leave the "
            "activation to XLA."
        )
    return None


def fuse_refusal(problem: Problem, fuse: Fuse, faster: dict[str, tuple[str, ...]]) -> str | None:
    """None, or why a backend leaves the activation of a problem to XLA.

    Args:
        problem: with an epilogue.
        fuse: the setting of the backend's config.
        faster: activations that gained time where they were measured, by contraction.
    """
    assert problem.epilogue is not None
    activation = problem.epilogue.activation
    kernel = kernel_activation(activation)
    if kernel is None:
        return (
            f"its epilogues know {', '.join(KERNEL_ACTIVATIONS)}, not {activation.name}: fuse='measured' or "
            "'never' leaves it to XLA."
        )
    if fuse == "always" or (fuse == "measured" and kernel.name in faster[problem.contraction]):
        return None
    return f"fuse={fuse!r} leaves {kernel.name} of {problem.contraction} to XLA: fuse='always' has the kernel take it."
