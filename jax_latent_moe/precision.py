"""The formats in which the experts' products multiply, and the weights in those formats.

Rounding to a format has the gradient of the identity. Weight gradients read the unrounded tokens and hidden rows. Input
gradients read the unrounded weights, or encode both operands for `dgrad`. There are no second derivatives.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jax_latent_moe.errors import ConfigError, InputError
from jax_latent_moe.formats import ScaledArray, encode
from jax_latent_moe.formats.scaled_rows import rows_format


@dataclasses.dataclass(frozen=True)
class Precision:
    """The formats of both operands in the products of the routed experts.

    A field that is None multiplies in the layer's dtype, and so do weight gradients always.

    Attributes:
        fwd: format of both forward products, "fp8_block" or "fp8_block_pow2".
        dgrad: format of both products that compute input gradients, in the same way.
    """

    fwd: str | None = None
    dgrad: str | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name = getattr(self, field.name)
            if name is None:
                continue
            try:
                rows_format(name)
            except ConfigError as error:
                raise ConfigError(f"precision.{field.name}: {error}") from None


class Codes(NamedTuple):
    """The experts' weights in the formats of a `Precision`; None for products in the layer's dtype.

    Attributes:
        fwd_in: w_in [E, l, m], or [E, l, 2 m] if gated.
        fwd_out: w_out [E, m, l].
        dgrad_in: w_in transposed, [E, m, l] or [E, 2 m, l]: FP8 matrix units read weights along the contracted axis.
        dgrad_out: w_out transposed, [E, l, m].
    """

    fwd_in: ScaledArray | None = None
    fwd_out: ScaledArray | None = None
    dgrad_in: ScaledArray | None = None
    dgrad_out: ScaledArray | None = None


def encode_weights(precision: Precision, w_in, w_out, *, gated: bool) -> Codes:
    """The weights' codes. A weight in codes of `precision.fwd` is used as it is.

    Args:
        precision: the formats.
        w_in: [E, l, m], or [E, l, 2 m] if gated; an array or a `ScaledArray`.
        w_out: [E, m, l], in the same way.
        gated: whether w_in is two matrices side by side.

    Raises:
        InputError: a weight is in another format than precision.fwd, or in codes where precision.dgrad needs an array.
    """
    if precision == Precision():
        return Codes()
    w_in, w_out = (w if isinstance(w, ScaledArray) else lax.stop_gradient(w) for w in (w_in, w_out))
    return Codes(
        _fwd(precision, "w_in", w_in, 2 if gated else 1),
        _fwd(precision, "w_out", w_out, 1),
        _dgrad(precision, "w_in", w_in),
        _dgrad(precision, "w_out", w_out),
    )


def _fwd(precision, name, weight, parts):
    format = precision.fwd
    if format is None:
        return None
    if not isinstance(weight, ScaledArray):
        return encode(weight, format, parts=parts)
    if weight.format != format:
        raise InputError(
            f"params experts/{name} is in {weight.format}, and precision.fwd={format!r} multiplies codes of its own "
            f"format: quantize the dense params to {format!r}, or set precision.fwd=None, which decodes."
        )
    return weight


def _dgrad(precision, name, weight):
    format = precision.dgrad
    if format is None:
        return None
    if isinstance(weight, ScaledArray):
        raise InputError(
            f"precision.dgrad={format!r} encodes the transposed weights, and params experts/{name} is in "
            f"{weight.format} already: set precision.dgrad=None, or dequantize params."
        )
    return encode(jnp.swapaxes(weight, 1, 2), format)
