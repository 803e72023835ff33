"""The static description of one grouped matmul, by which a backend decides whether and how to run it."""

import dataclasses
import operator
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax.export import is_symbolic_dim

from jax_latent_moe import checks
from jax_latent_moe.activations import BoundActivation, Residual
from jax_latent_moe.device import Device, current_device
from jax_latent_moe.errors import ConfigError

Contraction = Literal["fwd", "dgrad", "wgrad"]
Layout = Literal["dense", "gathered", "columns"]
SYMBOLIC_ROWS = 2**30
"""Rows that stand for a symbolic number of `jax.export`. No table of tiles has so many."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """The format and layout of one operand, or of the result.

    Attributes:
        format: the name of a dtype or of a registered `Format`.
        layout: "dense", "gathered" for `GatheredRows`, or "columns" for `LastColumns` of wider rows.
    """

    format: str
    layout: Layout = "dense"

    def __post_init__(self):
        checks.one_of("layout", self.layout, get_args(Layout))

    def __str__(self) -> str:
        return self.format if self.layout == "dense" else f"{self.layout} {self.format}"


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """An activation inside of a product: its value in fwd, its gradient in dgrad.

    Attributes:
        activation: the activation.
        residual: what fwd keeps, and what dgrad computes the gradient from. None in a fwd without a backward pass.
        bias: whether an expert's bias comes before the activation. No kernel adds one, so a backend that insists on
            fusing refuses it.
        encodes: the format in which a fwd stores the hidden rows, as `ScaledRows`; None for the product's dtype. A
            dgrad stores the gradient in the product's dtype and in this format, and reads codes of the transposed
            weight [E, N, K].
    """

    activation: BoundActivation
    residual: Residual | None
    bias: bool = False
    encodes: str | None = None

    def __str__(self) -> str:
        biased = " of a biased product" if self.bias else ""
        encoded = f", encoded in {self.encodes}" if self.encodes else ""
        return f"{self.activation}{biased}{encoded} keeping {self.residual or 'nothing'}"


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static description of one grouped matmul: everything that is known before it runs.

    Attributes:
        contraction: "fwd" is rows x w, "dgrad" is rows x w^T, "wgrad" is rows^T x rows, each per expert.
        num_rows: R, the number of all rows.
        num_experts: E, the number of experts, with or without rows.
        k: K of the weight [E, K, N].
        n: N of the weight [E, K, N].
        lhs: the rows [R, K] of fwd and wgrad, or [R, N] of dgrad.
        rhs: the weight of fwd and dgrad, or the rows [R, N] of wgrad.
        out: the result.
        device: the device that runs it.
        epilogue: the activation fused into the product; None for the plain product.
    """

    contraction: Contraction
    num_rows: int
    num_experts: int
    k: int
    n: int
    lhs: Operand
    rhs: Operand
    out: Operand
    device: Device
    epilogue: Epilogue | None = None

    def __str__(self) -> str:
        fused = f" with {self.epilogue}" if self.epilogue else ""
        sizes = f"{self.num_rows} rows, {self.num_experts} experts of {self.k} x {self.n}"
        return f"{self.contraction}{fused} of {self.lhs} and {self.rhs} to {self.out}, {sizes}"

    @property
    def planned_rows(self) -> int:
        """The number of rows that a kernel and its tile are chosen for. A symbolic number counts as a large call."""
        return SYMBOLIC_ROWS if is_symbolic_dim(self.num_rows) else self.num_rows

    def dense(self) -> "Problem":
        """The same problem with dense operands."""
        return dataclasses.replace(
            self,
            lhs=dataclasses.replace(self.lhs, layout="dense"),
            rhs=dataclasses.replace(self.rhs, layout="dense"),
        )

    def plain(self) -> "Problem":
        """The same product without its epilogue."""
        return dataclasses.replace(self, epilogue=None)


def problem(
    contraction: Contraction,
    num_rows: int,
    w_shape: tuple[int, ...],
    dtype,
    *,
    lhs: Operand | None = None,
    rhs: Operand | None = None,
    epilogue: Epilogue | None = None,
    device: Device | None = None,
) -> Problem:
    """Makes a `Problem`, for `explain` and `select`.

    Args:
        contraction: "fwd", "dgrad" or "wgrad".
        num_rows: R.
        w_shape: (E, K, N). K and N are symbolic under `jax.export`.
        dtype: dtype of the result, and of both operands unless they are given.
        lhs: the left operand; None for a dense array of dtype.
        rhs: the right operand; None for a dense array of dtype.
        epilogue: the activation fused into the product, or None.
        device: the device that runs it; None is JAX's default device.

    Raises:
        ConfigError: the contraction is unknown, w_shape does not hold three sizes, num_rows is not a size, dtype is not
            floating, an operand is not an `Operand`, or a wgrad has an epilogue.
    """
    checks.one_of("contraction", contraction, get_args(Contraction))
    if epilogue is not None and contraction == "wgrad":
        raise ConfigError(f"a wgrad with {epilogue} is unknown: fwd has an activation's value, dgrad its gradient.")
    try:
        sizes: list[Any] = [size if is_symbolic_dim(size) else operator.index(size) for size in w_shape]
    except TypeError:
        sizes = []
    if len(sizes) != 3 or any(size < 0 for size in sizes):
        raise ConfigError(f"w_shape={w_shape!r} must be three integers of at least 0: (experts, K, N).")
    num_experts, k, n = sizes
    rows: Any = num_rows if is_symbolic_dim(num_rows) else checks.integer("num_rows", num_rows)
    for name, operand in (("lhs", lhs), ("rhs", rhs)):
        if operand is not None:
            checks.instance(name, operand, Operand)
    own = Operand(_floating_name(dtype))
    return Problem(
        contraction, rows, num_experts, k, n, lhs or own, rhs or own, own, device or current_device(), epilogue
    )


def _floating_name(dtype) -> str:
    # NumPy reads None and Python's float as float64, which is rarely what the user means.
    python = dtype is None or (isinstance(dtype, type) and dtype in (float, int, bool, complex))
    try:
        found = None if python else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ConfigError(f"dtype={dtype!r} must be a floating dtype, such as 'bfloat16'.")
    return found.name
