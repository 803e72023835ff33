"""Low-rank adapters on the experts and the two projections, over dense or quantised weights.

Example, with codes below (QLoRA, arXiv 2305.14314)::

    params = lora.adapt(jax.random.key(0), quantize(params, config, "mxfp4"), config, rank=16)
    adapters, frozen = lora.split(params)
    y, aux = latent_moe(merge_state(adapters, frozen), x, config)  # differentiate with respect to adapters
    dense = lora.merge(params, config)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jax_latent_moe.arrays import typed_key
from jax_latent_moe.checks import positive, positive_int
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import InputError
from jax_latent_moe.formats import decoded
from jax_latent_moe.low_rank import LowRank
from jax_latent_moe.params import ADAPTED, Params, check_params, param_shapes

TARGETS = tuple("/".join(path) for path in ADAPTED)
"""The weights that can have an adapter."""


def adapt(
    key: Key[Array, ""],
    params: Params,
    config: LatentMoEConfig,
    *,
    rank: int,
    alpha: float = 16.0,
    targets: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """The same tree with a `LowRank` in the place of each target. The layer's values stay the same, because b is 0.

    Args:
        key: a JAX random key, for a: normal with standard deviation 1 / sqrt(K).
        params: dense or quantised.
        config: the layer.
        rank: r.
        alpha: the adapter is multiplied by alpha / r.
        targets: some of `TARGETS`; None takes all that the layer has.

    Raises:
        InputError: key is not one key, params do not fit the config, a target is unknown, or it has an adapter already.
        ConfigError: rank or alpha is not positive.
    """
    key, rank, scale = typed_key(key), positive_int("rank", rank), positive("alpha", alpha) / rank
    params, shapes = check_params(params, config), param_shapes(config)
    present = [target for target in TARGETS if target.split("/")[0] in shapes]
    adapted: dict[str, dict[str, Any]] = {part: dict(leaves) for part, leaves in params.items()}
    if isinstance(targets, str) or (targets is not None and not len(targets)):
        raise InputError(
            f"targets={targets!r} must be a sequence with at least one of {', '.join(map(repr, present))}."
        )
    for target in present if targets is None else targets:
        if target not in present:
            raise InputError(f"targets name {target!r}, which is not one of {', '.join(map(repr, present))}.")
        part, name = target.split("/")
        if isinstance(adapted[part][name], LowRank):
            raise InputError(f"params {target} have an adapter already: lora.merge(params, config) first.")
        shape, stacked = shapes[part][name].shape, part == "experts"
        leading, k, trailing = shape[:stacked], shape[stacked], shape[stacked + 1 :]
        own = jax.random.fold_in(key, TARGETS.index(target))
        a = jax.random.normal(own, (*leading, k, rank), jnp.float32) / math.sqrt(k)
        b = jnp.zeros((*leading, rank, *trailing), config.param_dtype)
        adapted[part][name] = LowRank(adapted[part][name], a.astype(config.param_dtype), b, scale)
    return adapted


def merge(params: Params, config: LatentMoEConfig) -> Params:
    """The tree with base + scale * a b for each adapter, added in float32 and rounded to config.param_dtype.

    These weights are dense. Codes without an adapter stay codes: `dequantize` decodes them.

    Raises:
        InputError: params do not fit the config.
    """
    params, shapes = check_params(params, config), param_shapes(config)

    def merged(weight: Any, shape) -> Any:
        if not isinstance(weight, LowRank):
            return weight
        base = decoded(weight.base, jnp.float32).astype(jnp.float32).reshape(shape)
        a, b = weight.a.astype(jnp.float32), weight.b.astype(jnp.float32)
        flat = b.reshape(*b.shape[: a.ndim - 1], -1)
        product = jnp.matmul(a, flat, precision=jax.lax.Precision.HIGHEST)
        return (base + weight.scale * product.reshape(shape)).astype(config.param_dtype)

    return {
        part: {name: merged(leaf, shapes[part][name].shape) for name, leaf in leaves.items()}
        for part, leaves in params.items()
    }


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """Splits parameters into the adapters, which are trained, and the rest, which stays as it is.

    `merge_state(adapters, rest)` puts the two trees together again. `split_state` differs: it also trains the weights
    without an adapter.

    Args:
        params: the parameters of a layer, or of a model in nested dicts.
    """
    if not isinstance(params, Mapping):
        return {}, params
    adapters, rest = {}, {}
    for key, value in params.items():
        if isinstance(value, LowRank):
            adapters[key], rest[key] = value.adapter, value.frozen
            continue
        below, rest[key] = split(value)
        if below:
            adapters[key] = below
    return adapters, rest
