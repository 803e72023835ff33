"""Quantises the experts' weights of a layer, and decodes them again."""

import functools
from typing import Any

import jax

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import InputError
from jax_latent_moe.formats import ScaledArray, encode
from jax_latent_moe.low_rank import LowRank
from jax_latent_moe.params import Params, check_params, param_shapes

_encode = functools.partial(jax.jit, static_argnames=("name", "parts"))(encode)
"""Jitted, so that no float32 copy of a whole weight is made."""


def quantize(params: Params, config: LatentMoEConfig, format: str) -> dict[str, dict[str, Any]]:
    """The same tree with the experts' weights in a format: codes and scales in place of arrays.

    `latent_moe` and both Flax modules compute with it. The codes get no gradient: x, the router and the projections
    do. It can be jitted with config and format static, and keeps the sharding over experts.

    Args:
        params: as `init_params` makes them, with dense experts.
        config: the layer.
        format: a registered format, such as "fp8_block", "mxfp4" or "int8": `formats.FORMATS` holds all.

    Returns:
        params with `ScaledArray` leaves at experts/w_in and experts/w_out. Other leaves are the same arrays.

    Raises:
        InputError: params do not fit the config, or are quantised already.
        ConfigError: the format is unknown, or needs weights whose sizes are multiples of its blocks.
    """
    params = check_params(params, config)
    experts = dict(params["experts"])
    for name in ("w_in", "w_out"):
        weight = experts[name]
        _refuse_adapter(name, weight)
        if isinstance(weight, ScaledArray):
            raise InputError(f"params experts/{name} is in format {weight.format} already: dequantize params first.")
        parts = weight.shape[2] if weight.ndim == 4 else 1
        experts[name] = _encode(weight.reshape(*weight.shape[:2], -1), name=format, parts=parts)
    return params | {"experts": experts}


def dequantize(params: Params, config: LatentMoEConfig) -> Params:
    """The tree with dense experts in config.param_dtype; leaves that are dense already stay as they are.

    Raises:
        InputError: params do not fit the config.
    """
    params, shapes = check_params(params, config), param_shapes(config)["experts"]
    for name, weight in params["experts"].items():
        _refuse_adapter(name, weight)
    experts = {
        name: weight.decode(config.param_dtype).reshape(shapes[name].shape)
        if isinstance(weight, ScaledArray)
        else weight
        for name, weight in params["experts"].items()
    }
    return params | {"experts": experts}


def _refuse_adapter(name, weight):
    if isinstance(weight, LowRank):
        raise InputError(f"params experts/{name} has a low-rank adapter: lora.merge(params, config) first.")
