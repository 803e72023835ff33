"""The limits of both backends with Hopper kernels, and the activations in their epilogues."""

import dataclasses
from typing import Literal

from jax_latent_moe import native
from jax_latent_moe.activations import BoundActivation
from jax_latent_moe.device import Device
from jax_latent_moe.formats import FORMATS
from jax_latent_moe.grouped_matmul.problem import Problem

Fuse = Literal["measured", "always", "never"]
FUSE = ("measured", "always", "never")
DTYPES = ("bfloat16", "float16")
FP8 = ("fp8_block", "fp8_block_pow2")
"""The formats of rows and weights that FP8 kernels multiply."""
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
    """An activation as the kernels' epilogues take it.

    Attributes:
        name: one of KERNEL_ACTIVATIONS.
        gated: whether it reads a gate and an up half.
        beta: situ_glu's bound on the gate; 0 otherwise.
        linear_beta: situ_glu's bound on the up half; 0 if there is none.
    """

    name: str
    gated: bool
    beta: float = 0.0
    linear_beta: float = 0.0


def library(device: Device) -> native.Library:
    """The compiled kernels of a device: those that its description names, else those of the library loaded here."""
    return native.library() if device.kernels is None else native.Library(dict(device.kernels), None)


def kernel_activation(activation: BoundActivation) -> KernelActivation | None:
    """An activation of the registry as the epilogues take it; None if they do not have it."""
    parameters = dict(activation.parameters)
    name = _EPILOGUES.get((activation.name, bool(parameters.get("gelu_approximate"))))
    if name is None:
        return None
    beta, linear_beta = parameters.get("situ_beta") or 0.0, parameters.get("situ_linear_beta") or 0.0
    return KernelActivation(name, activation.gated, beta, linear_beta)


def refusal(problem: Problem, feature_multiple: int) -> str | None:
    """None, or the reason why 16-bit kernels for Hopper GPUs cannot run the problem.

    Args:
        problem: the grouped matmul.
        feature_multiple: the number that K and N must be multiples of, and half of N for a gated activation in fwd.
    """
    if reason := device_refusal(problem):
        return reason
    if problem.lhs.format in FORMATS or problem.rhs.format in FORMATS:
        return (
            f"it has no kernels for {problem.lhs.format} x {problem.rhs.format}: it widens codes of a weight beside "
            "bfloat16 rows, and XlaBackend() decodes codes, a few experts at a time."
        )
    formats = {operand.format for operand in (problem.lhs, problem.rhs, problem.out)}
    if len(formats) > 1 or not formats <= set(DTYPES):
        return (
            f"its kernels need all operands in {' or all in '.join(DTYPES)}, not {problem.lhs.format} x "
            f"{problem.rhs.format} to {problem.out.format}."
        )
    return size_refusal(problem, feature_multiple)


def both_fp8(problem: Problem) -> bool:
    """Whether a problem is one of FP8 kernels: both of its operands are codes with scales of blocks."""
    return problem.lhs.format in FP8 and problem.rhs.format in FP8


def fp8_refusal(
    problem: Problem, dtypes: tuple[str, ...], k_multiple: int, n_multiple: int, *, gradients: bool = False
) -> str | None:
    """None, or the reason why an FP8 kernel cannot run a problem with two operands in codes.

    Args:
        problem: the grouped matmul.
        dtypes: the dtypes that the kernel stores.
        k_multiple: the number that K must be a multiple of.
        n_multiple: the number that N must be a multiple of.
        gradients: whether a dgrad may have an activation's gradient in its epilogue, which also encodes it.
    """
    if reason := device_refusal(problem):
        return reason
    encodes = problem.epilogue is not None and problem.epilogue.encodes is not None
    if problem.contraction != "fwd" and not (gradients and problem.contraction == "dgrad" and encodes):
        return (
            "its FP8 kernel computes only fwd: FP8 matrix units read both operands along the contracted axis. Encode "
            "the transposed weight and ask for fwd."
        )
    if problem.out.format not in dtypes:
        return f'its FP8 kernel stores {" or ".join(dtypes)}, not {problem.out.format}: set dtype="bfloat16".'
    for name, multiple in (("k", k_multiple), ("n", n_multiple)):
        if (size := getattr(problem, name)) % multiple or not size:
            return f"{name}={size} of FP8 codes is not a positive multiple of {multiple}: pad it, or use XlaBackend()."
    return None


def widen_refusal(problem: Problem, k_multiple: int, n_multiple: int) -> str | None:
    """None, or the reason why a kernel cannot run a problem with 16-bit rows and a weight whose codes it widens.

    Args:
        problem: the grouped matmul.
        k_multiple: the number that K must be a multiple of.
        n_multiple: the number that N must be a multiple of, and half of N for a gated activation.
    """
    if reason := device_refusal(problem):
        return reason
    codes = f"{problem.lhs.format} x {problem.rhs.format}"
    if problem.contraction != "fwd":
        return f"its kernel for {codes} computes only fwd: XlaBackend() decodes codes, a few experts at a time."
    if {problem.lhs.format, problem.out.format} != {"bfloat16"}:
        return f"its kernel widens codes to bfloat16, not {codes} to {problem.out.format}: cast the rows."
    if problem.k % k_multiple or not problem.k:
        return (
            f"k={problem.k} of a weight in {problem.rhs.format} is not a positive multiple of {k_multiple}: pad it, or "
            "use XlaBackend()."
        )
    return size_refusal(problem, n_multiple)


def device_refusal(problem: Problem) -> str | None:
    """None, or the reason why no kernel for Hopper GPUs runs on the problem's device."""
    if problem.device.architecture != "sm90":
        return f"its kernels are for NVIDIA Hopper GPUs (H100, H200), not {problem.device.kind!r}."
    return None


def size_refusal(problem: Problem, feature_multiple: int) -> str | None:
    """None, or the size that is not a positive multiple of the given number; see `refusal`."""
    for name in ("k", "n"):
        if (size := getattr(problem, name)) % feature_multiple or not size:
            return f"{name}={size} is not a positive multiple of {feature_multiple}."
    epilogue = problem.epilogue
    if epilogue and epilogue.activation.gated and problem.contraction == "fwd" and problem.n // 2 % feature_multiple:
        return (
            f"half of n={problem.n} is not a multiple of {feature_multiple}: pad it, or leave the activation to XLA "
            "with fuse='never'."
        )
    return None


def fuse_refusal(problem: Problem, fuse: Fuse, faster: dict[str, tuple[str, ...]]) -> str | None:
    """None, or the reason why a backend leaves the activation of a problem to XLA.

    Args:
        problem: a problem with an epilogue.
        fuse: the setting of the backend's config.
        faster: the activations that were faster fused when they were measured, by contraction.
    """
    assert problem.epilogue is not None
    activation = problem.epilogue.activation
    if problem.contraction not in faster:
        return f"no {problem.contraction} has an epilogue: fwd has an activation's value, dgrad its gradient."
    kernel = kernel_activation(activation)
    if kernel is None:
        return (
            f"its epilogues have {', '.join(KERNEL_ACTIVATIONS)}, not {activation.name}: leave it to XLA with "
            "fuse='measured' or 'never'."
        )
    if fuse == "always" or (fuse == "measured" and kernel.name in faster[problem.contraction]):
        return None
    encodes = problem.epilogue.encodes
    what = kernel.name if encodes is None else f"{kernel.name}, encoded in {encodes},"
    others = "XLA" if encodes is None else "other kernels"
    return f"fuse={fuse!r} leaves {what} of {problem.contraction} to {others}: fuse='always' fuses it."
