"""The formats in which the experts' products multiply, and the weights in those formats.

Rounding to a format has the gradient of the identity. Weight gradients read the unrounded tokens and hidden rows. Input
gradients read the unrounded weights, or encode both operands for `dgrad`. There are no second derivatives.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_latent_moe.errors import ConfigError, InputError
from jax_latent_moe.formats import FORMATS, ScaledArray, encode
from jax_latent_moe.formats.both_layouts import encode_both, kernel_encodes
from jax_latent_moe.formats.scaled_rows import rows_format


@dataclasses.dataclass(frozen=True)
class Precision:
    """The formats of both operands in the products of the routed experts.

    A field that is None multiplies in the layer's dtype. Weight gradients always do.

    Attributes:
        fwd: format of both forward products, "fp8_block" or "fp8_block_pow2".
        dgrad: format of both products that compute input gradients, in the same way.
    """

    fwd: str | None = None
    dgrad: str | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name = getattr(self, field.name)
            if name is not None:
                check_rows_format(f"precision.{field.name}", name)


def check_rows_format(field: str, name: str) -> None:
    """Refuses values that are not a format of rows, by the field's name."""
    try:
        rows_format(name)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from None


class Codes(NamedTuple):
    """The experts' weights in the formats of a `Precision`; None for products in the layer's dtype.

    FP8 matrix units read weights along the contracted axis, so forward products and input gradients want two layouts.

    Attributes:
        fwd_in: w_in [E, l, m], or [E, l, 2 m] if gated.
        fwd_out: w_out [E, m, l].
        dgrad_in: w_in transposed, [E, m, l] or [E, 2 m, l].
        dgrad_out: w_out transposed, [E, l, m].
        of_in: the first row of each expert's w_in (on a mesh, of each shard), which tells codes of other weights apart.
            None for codes that a call made for itself.
        of_out: the same for w_out.
    """

    fwd_in: ScaledArray | None = None
    fwd_out: ScaledArray | None = None
    dgrad_in: ScaledArray | None = None
    dgrad_out: ScaledArray | None = None
    of_in: Array | None = None
    of_out: Array | None = None


def encode_weights(precision: Precision, w_in, w_out, *, gated: bool, compiled: bool) -> Codes:
    """The weights' codes. A weight in codes of `precision.fwd` is used as it is.

    Args:
        precision: the formats.
        w_in: [..., E, l, m], or [..., E, l, 2 m] if gated; an array or a `ScaledArray`.
        w_out: [..., E, m, l], in the same way.
        gated: whether w_in is two matrices side by side.
        compiled: whether the compiled kernel encodes the weights that it can; see `kernel_encodes`.

    Raises:
        InputError: a weight is in another format than precision.fwd, or in codes where precision.dgrad needs an array.
    """
    if precision == Precision():
        return Codes()
    (fwd_in, dgrad_in), (fwd_out, dgrad_out) = (
        _layouts(precision, name, weight, parts, compiled)
        for name, weight, parts in (("w_in", w_in, 2 if gated else 1), ("w_out", w_out, 1))
    )
    return Codes(fwd_in, fwd_out, dgrad_in, dgrad_out)


def _layouts(precision, name, weight, parts, compiled) -> tuple[ScaledArray | None, ScaledArray | None]:
    """A weight's codes for the forward product and for the input gradient."""
    fwd, dgrad = precision.fwd, precision.dgrad
    if isinstance(weight, ScaledArray):
        return _frozen(precision, name, weight), None
    weight = lax.stop_gradient(weight)
    if fwd is not None and fwd == dgrad and _same_blocks(fwd, weight.shape[-1], parts):
        if compiled and kernel_encodes(weight, fwd, parts):
            return encode_both(weight, fwd, parts)
        # The codes of the transposed weight have the weight's own order in memory.
        transposed = encode(jnp.swapaxes(weight, -1, -2), fwd)
        return _transposed(transposed, parts), transposed
    return (
        None if fwd is None else encode(weight, fwd, parts=parts),
        None if dgrad is None else encode(jnp.swapaxes(weight, -1, -2), dgrad),
    )


def _frozen(precision, name, weight: ScaledArray) -> ScaledArray | None:
    if precision.dgrad is not None:
        raise InputError(
            f"precision.dgrad={precision.dgrad!r} encodes the transposed weights, and params experts/{name} is in "
            f"{weight.format} already: set precision.dgrad=None, or dequantize params."
        )
    if precision.fwd is not None and weight.format != precision.fwd:
        raise InputError(
            f"params experts/{name} is in {weight.format}, and precision.fwd={precision.fwd!r} multiplies codes of its "
            f"own format: quantize the dense params to {precision.fwd!r}, or set precision.fwd=None, which decodes."
        )
    return None if precision.fwd is None else weight


def _same_blocks(format: str, columns: int, parts: int) -> bool:
    """Whether a weight and its transpose have the same blocks: they are square, and none holds both gate and up."""
    size, other = FORMATS[format].block
    return size is not None and size == other and (parts == 1 or columns // parts % size == 0)


def _transposed(weight: ScaledArray, parts: int) -> ScaledArray:
    """The weight [..., K, P * N] from its transpose [..., P * N, K], with its codes and scales."""

    def transpose(leaf):
        split = leaf.reshape(*leaf.shape[:-3], leaf.shape[-2], parts, leaf.shape[-1] // parts)
        return jnp.moveaxis(split, -3, -1)

    return jax.tree.map(transpose, weight)
