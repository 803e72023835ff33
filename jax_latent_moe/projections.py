"""The router's logits and the latent projections of one token, by a compiled kernel.

XLA multiplies one row by a weight in two kernels, and stores all the products in between. The compiled kernel
(custom_calls/src/decode) reads a weight once. One launch computes the logits and the down-projection of a token,
another the up-projection. It multiplies exactly and adds in float32, in a fixed order. It has no gradient, so it runs
only if nothing is differentiated. For eight tokens XLA's matmuls were faster.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_latent_moe import native
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.decode import refusal
from jax_latent_moe.device import Device, current_device
from jax_latent_moe.grouped_matmul.sm90 import DTYPES

TILE_BYTES = 128
"""Bytes of each row of a weight that a cluster of blocks reads (kTileBytes)."""
PARTS = (1, 2, 4, 8)
"""The sizes of a cluster. Each of its blocks multiplies a part of the contracted axis."""

Kernel = Float[Array, "d e"] | None
Projection = Float[Array, "d l"] | None
Products = tuple[Any, Any]
"""Logits [T, E] and a product [T, l]; None without the weight."""


def projections(
    config: LatentMoEConfig,
    usual: Callable[..., Products],
    x: Float[Array, "t d"],
    kernel: Kernel,
    projection: Projection,
) -> Products:
    """The logits x @ kernel in float32, and x @ projection in the dtype of x; in one compiled launch, if it can run.

    Args:
        config: the layer.
        usual: computes both from x, kernel and projection, if the compiled kernel does not run or something is
            differentiated.
        x: [T, d].
        kernel: [d, E], the router's; None for no logits.
        projection: [d, l], None for no projection.
    """
    if refusal_of_projections(config, x, kernel, projection) is not None:
        return usual(x, kernel, projection)
    return _compiled(usual, x, kernel, projection)


def projection(config: LatentMoEConfig, x: Float[Array, "t l"], kernel: Float[Array, "l d"]) -> Float[Array, "t d"]:
    """The product x @ kernel in the dtype of both; by the compiled kernel, if it can run."""
    _, out = projections(config, lambda x, _, kernel: (None, x @ kernel), x, None, kernel)
    return out


def refusal_of_projections(
    config: LatentMoEConfig, x: Any, kernel: Any, projection: Any, *, device: Device | None = None
) -> str | None:
    """None, or the reason why the compiled kernel does not run on a device, as a sentence.

    Args:
        config: the layer.
        x: [T, d], an array or its shape and dtype, like kernel and projection. T may be a symbolic size of
            `jax.export`.
        kernel: as for `projections`.
        projection: as for `projections`.
        device: the device that runs it; None is JAX's default device.
    """
    rows, dtype = x.shape[0], x.dtype.name
    if (reason := refusal(config.backend, rows, config.top_k, device or current_device())) is not None:
        return reason
    if config.parallel is not None:
        return "config.parallel is set, and the kernel runs on one device."
    if rows > 1:
        return f"the compiled kernel multiplies one token, not {rows}."
    if dtype not in DTYPES:
        return f"tokens are in {dtype}, not in {' or '.join(DTYPES)}."
    if kernel is not None and config.router.dtype != "float32":
        return f"router.dtype is {config.router.dtype!r}, not 'float32'."
    for name, weight, dtypes in (("router", kernel, ("float32", dtype)), ("projection", projection, (dtype,))):
        if weight is None:
            continue
        if weight.dtype.name not in dtypes:
            return f"the {name}'s kernel is in {weight.dtype.name}, not in {' or '.join(dtypes)}."
        multiple = 16 // weight.dtype.itemsize
        if weight.shape[1] % multiple:
            return f"the {weight.shape[1]} columns of the {name}'s kernel are not a multiple of {multiple}."
    return None


def explain(config: LatentMoEConfig, tokens: Any, *, device: Device | None = None) -> str:
    """What multiplies the router's logits and the projections where nothing is differentiated, in a line.

    It is about tokens in config.dtype and the parameters that `init_params` makes.

    Args:
        config: the layer.
        tokens: T, an integer unless it is a symbolic size of `jax.export`.
        device: the device that runs it; None is JAX's default device.
    """

    def described(rows, columns, dtype):
        return jax.ShapeDtypeStruct((rows, columns), jnp.dtype(dtype))

    d, latent, dtype = config.hidden_size, config.latent_size, config.dtype
    kernel, x = described(d, config.num_experts, config.param_dtype), described(tokens, d, dtype)
    if latent is None:
        launches = {"the router's logits": (x, kernel, None)}
    else:
        launches = {
            "the router's logits and the down-projection": (x, kernel, described(d, latent, dtype)),
            "the up-projection": (described(tokens, latent, dtype), None, described(latent, d, dtype)),
        }
    refusals = {what: refusal_of_projections(config, *given, device=device) for what, given in launches.items()}
    if len(set(refusals.values())) == 1:
        refusals = {"the router's logits" + " and both projections" * (latent is not None): refusals.popitem()[1]}
    return " ".join(
        f"the compiled kernel for one token multiplies {what}."
        if reason is None
        else f"XLA multiplies {what}: {reason}"
        for what, reason in refusals.items()
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _compiled(usual, x, kernel, projection):
    del usual
    nothing = jnp.zeros((x.shape[1], 0), x.dtype)
    weights = [nothing if weight is None else weight for weight in (kernel, projection)]
    results = [
        jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), dtype)
        for weight, dtype in zip(weights, (jnp.float32, x.dtype), strict=True)
    ]
    parts = cluster_parts(*weights)
    logits, out = native.call("decode_projections", [x, *weights], results, parts=parts)
    return None if kernel is None else logits, None if projection is None else out


def _forward(usual, x, kernel, projection):
    return jax.vjp(usual, x, kernel, projection)


def _backward(usual, pullback, gradients):
    del usual
    return pullback(gradients)


_compiled.defvjp(_forward, _backward)


def cluster_parts(*weights: Float[Array, "k n"]) -> int:
    """The parts of the contracted axis for one launch with these weights, on the current device."""
    return parts_of(weights, current_device().num_sms)


def parts_of(weights, num_sms: int) -> int:
    """The parts of the contracted axis that give each SM a block, or the most that a cluster has."""
    tiles = sum(-(-weight.shape[1] * weight.dtype.itemsize // TILE_BYTES) for weight in weights)
    return next((parts for parts in PARTS if tiles * parts >= num_sms), PARTS[-1])
