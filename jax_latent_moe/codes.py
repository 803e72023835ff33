"""The codes of a training step: made once, from the weights at its start, and read by every call in it."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import InputError
from jax_latent_moe.experts import encoded
from jax_latent_moe.formats import ScaledArray
from jax_latent_moe.low_rank import LowRank
from jax_latent_moe.parallel.own_codes import on_own_experts, whole_latents
from jax_latent_moe.params import Params, as_array, check_config, param_shapes
from jax_latent_moe.precision import Codes, Precision


def encode_experts(params: Params, config: LatentMoEConfig) -> Codes | None:
    """The experts' weights in the formats of config.precision, for `latent_moe(params, x, config, codes=codes)`.

    A training step calls it once, before its first microbatch. Every call, its recomputation and its gradient then read
    these codes. Without them, each call encodes the weights again. The results are the same to the bit. Codes are
    rounded once, from the dtype of the parameters. They have no gradient. They are not state: a step makes them from
    its parameters and drops them at its end, so no checkpoint holds them.

    Args:
        params: the parameters of a layer with dense experts, as the layer gets them. The experts may have leading axes,
            such as that of stacked layers. Only params["experts"] is read.
        config: the layer. With `parallel`, call it under the mesh of `jax.set_mesh`: each device encodes its own part.
            If the fsdp axis would cut a block of 128 x 128, a device holds its experts' codes for the whole latent.

    Returns:
        The codes, one byte per weight for each layout. None if config.precision is None.

    Raises:
        InputError: the experts do not fit the config, are quantised already, or have adapters.
        ConfigError: an axis of the mesh does not divide what it splits.
    """
    check_config(config)
    if config.precision is None or config.precision == Precision():
        return None
    w_in, w_out = (_dense(params, config, name) for name in ("w_in", "w_out"))
    leading = w_out.ndim - 3
    if w_in.shape[: leading + 1] != w_out.shape[:-2]:
        raise InputError(
            f"params experts/w_in of shape {w_in.shape} and experts/w_out of shape {w_out.shape} must have the same "
            "axes before those of an expert: stack both in the same way."
        )
    return on_own_experts(partial(_encode, config), config, leading, w_in, w_out)


def checked_codes(codes: Codes, params: Params, config: LatentMoEConfig) -> Codes:
    """The codes for one call, full of NaN if they were made from other weights.

    Raises:
        InputError: `encode_experts` does not make such codes from these params.
    """
    if not isinstance(codes, Codes):
        raise InputError(f"codes of type {type(codes).__name__} must be what encode_experts(params, config) returns.")
    expected = jax.eval_shape(partial(encode_experts, config=config), params)
    if expected is None:
        raise InputError(
            f"codes have no effect with config.precision={config.precision}: leave them out, or set config.precision."
        )
    found, wanted = _described(codes), _described(expected)
    if found != wanted:
        other = [name for name in wanted if found[name] != wanted[name]]
        have, need = (", ".join(f"{name} {of[name]}" for name in other) for of in (found, wanted))
        raise InputError(
            f"codes have {have}, and the layer needs {need} for config.precision={config.precision}: make them by "
            "encode_experts(params, config), with the config, the params and the mesh of the layer."
        )
    w_in, w_out = (lax.stop_gradient(params["experts"][name]) for name in ("w_in", "w_out"))
    return on_own_experts(_checked, config, 0, w_in, w_out, jax.tree.map(jnp.asarray, codes))


def _dense(params, config, name):
    try:
        weight = as_array(f"params experts/{name}", params["experts"][name])
    except (KeyError, TypeError):
        raise InputError(f"params have nothing at experts/{name}: init_params(key, config) makes them.") from None
    if isinstance(weight, ScaledArray | LowRank):
        kind = f"in {weight.format} already" if isinstance(weight, ScaledArray) else "below an adapter"
        raise InputError(
            f"params experts/{name} is {kind}: only dense weights are encoded. Call the layer without codes."
        )
    expected = param_shapes(config)["experts"][name].shape
    if weight.shape[-len(expected) :] != expected:
        raise InputError(f"params experts/{name} of shape {weight.shape} must end in the shape {expected}.")
    return lax.stop_gradient(jnp.asarray(weight))


def _encode(config, w_in, w_out) -> Codes:
    axis = w_out.ndim - 2
    first_rows = {"of_in": _first_row(w_in, axis), "of_out": _first_row(w_out, axis)}
    w_in, w_out = whole_latents(config, w_in, w_out)
    columns = w_in.reshape(*w_in.shape[: axis + 1], -1)
    return encoded(config, columns, w_out)._replace(**first_rows)


def _first_row(weight, axis):
    return lax.slice_in_dim(weight, 0, 1, axis=axis)


def _checked(w_in, w_out, codes) -> Codes:
    """The codes, with scales of NaN if the weights' first rows differ from the rows that were encoded.

    A step of an optimiser changes these rows, and reading them takes little time.
    """
    # NaN equals NaN here: it must not spread from an expert that no token reaches.
    same = jnp.array_equal(_first_row(w_in, 1), codes.of_in, equal_nan=True)
    same &= jnp.array_equal(_first_row(w_out, 1), codes.of_out, equal_nan=True)

    def checked(weight: ScaledArray) -> ScaledArray:
        scales = jax.tree.map(lambda scale: jnp.where(same, scale, jnp.nan), weight.scales)
        return ScaledArray(weight.codes, scales, weight.format)

    scaled = {name: checked(leaf) for name, leaf in codes._asdict().items() if isinstance(leaf, ScaledArray)}
    return Codes()._replace(**scaled)


def _described(codes: Codes) -> dict[str, str]:
    """Format, shape and dtypes of each array, by its name."""

    def text(array):
        leaves = ", ".join(f"{leaf.dtype} {leaf.shape}" for leaf in jax.tree.leaves(array))
        return f"{array.format} ({leaves})" if isinstance(array, ScaledArray) else leaves or "None"

    return {name: text(array) for name, array in codes._asdict().items()}
