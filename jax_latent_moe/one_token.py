"""The routed part of one token in one custom call: logits and down-projection, choice, experts and up-projection.

In separate calls, a kernel starts only after the one before has ended. In one call it starts earlier, prepares what it
can, and waits for its inputs (custom_calls/src/ffi/decode_token.cc). The call knows that no expert is chosen twice. It
has no gradient, so it runs only if nothing is differentiated.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_latent_moe import native, projections
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.decode import Decode, attributes_of, plan_decode, refusal, stored_arrays, workspace
from jax_latent_moe.derivatives import gradients_of_perturbed, vjp_of_perturbed
from jax_latent_moe.device import Device
from jax_latent_moe.experts import flat
from jax_latent_moe.low_rank import LowRank, cast
from jax_latent_moe.params import Params
from jax_latent_moe.projections import parts_of, refusal_of_projections
from jax_latent_moe.routing.router import weighs_in_kernel
from jax_latent_moe.routing.top_k import MOST_SCORES, MOST_WEIGHTS


@dataclasses.dataclass(frozen=True)
class OneToken:
    """The decision to run one token's routed part in one call.

    Attributes:
        decode: the experts' part.
        parts: parts of the contracted axis in the kernel of the logits and the down-projection.
        up_parts: the same for the up-projection.
        by_sigmoid: whether the choice is by sigmoids of the logits, not by the logits.
        sigmoid: whether the weights are made of sigmoids, not of exponentials.
        eps: as for `routing.top_k.compiled_top_k_and_weights`.
        factor: multiplies the weights.
    """

    decode: Decode
    parts: int
    up_parts: int
    by_sigmoid: bool
    sigmoid: bool
    eps: float
    factor: float


class Weights(NamedTuple):
    """The parameters that the call reads, in the dtypes in which it reads them.

    Attributes:
        kernel: [d, E], the router's.
        bias: [E] float32, added for the choice, or None.
        down_proj: [d, l], or None for experts of width d.
        w_in: [E, l, m], or [E, l, 2 m] if gated, or a `ScaledArray`.
        w_out: [E, m, l], or a `ScaledArray`.
        up_proj: [l, d], or None for the sum without it.
    """

    kernel: Any
    bias: Any
    down_proj: Any
    w_in: Any
    w_out: Any
    up_proj: Any


class Routed(NamedTuple):
    """The results of one token.

    Attributes:
        logits: [1, E] float32.
        expert_ids: [1, k] int32.
        weights: [1, k] float32.
        out: [1, l], the weighted sum of the experts, or [1, d], its product with the up-projection.
    """

    logits: Float[Array, "1 e"]
    expert_ids: Int[Array, "1 k"]
    weights: Float[Array, "1 k"]
    out: Float[Array, "1 n"]


def weights_of(config: LatentMoEConfig, params: Params) -> Weights:
    """What the call reads of the layer's parameters."""
    router, experts = params["router"], params["experts"]
    down_proj = None if config.latent_size is None else cast(params["down_proj"]["kernel"], config.dtype)
    w_in, w_out = (cast(experts[name], config.dtype) for name in ("w_in", "w_out"))
    w_in = w_in if isinstance(w_in, LowRank) else flat(w_in)
    return Weights(router["kernel"], router.get("bias"), down_proj, w_in, w_out, next_projection(config, params))


def next_projection(config: LatentMoEConfig, params: Params) -> Float[Array, "l d"] | None:
    """The up-projection if it directly follows the experts, so that their kernels may run it. None otherwise."""
    between = config.latent_norm == "post" or config.apply_routed_scale_to_output or config.router.pad_to_capacity
    if config.latent_size is None or config.parallel is not None or between:
        return None
    kernel = cast(params["up_proj"]["kernel"], config.dtype)
    return None if isinstance(kernel, LowRank) else kernel


def plan_token(
    config: LatentMoEConfig, tokens: Any, dtype: Any, params: Params, *, device: Device | None = None
) -> OneToken | str:
    """The decision, or the reason why separate calls run, as a sentence.

    The layer's call must have no mask, no replayed choice and no jitter.

    Args:
        config: the layer.
        tokens: T, an integer unless it is a symbolic size of `jax.export`.
        dtype: dtype of the tokens.
        params: the layer's parameters, or their shapes.
        device: the device that runs them; None is JAX's default device.
    """
    device, router = device or projections.current_device(), config.router
    if (reason := refusal(config.backend, tokens, config.top_k, device)) is not None:
        return reason
    if tokens > 1:
        return f"these kernels take one token, not {tokens}."
    weights = jax.eval_shape(functools.partial(weights_of, config), params)
    kernel, bias, down_proj, w_in, w_out, up_proj = weights
    if any(isinstance(weight, LowRank) for weight in weights):
        return "the layer has adapters, whose products run separately."
    if jnp.dtype(dtype).name != config.dtype:
        return f"the router reads {jnp.dtype(dtype).name}, and the experts read {config.dtype}."
    x = jax.ShapeDtypeStruct((tokens, kernel.shape[0]), jnp.dtype(dtype))
    latent = jax.ShapeDtypeStruct((tokens, w_out.shape[2]), jnp.dtype(dtype))
    for rows, *given in ((x, kernel, down_proj), (latent, None, up_proj)):
        if (reason := refusal_of_projections(config, rows, *given, device=device)) is not None:
            return reason
    if not weighs_in_kernel(router, tokens, config.num_experts, config.top_k, config.backend, device):
        return (
            "no compiled kernel makes this router's choice and its weights: they must be divided by their sum, with at "
            f"most {MOST_SCORES} experts and {MOST_WEIGHTS} choices."
        )
    by_logit = router.selection == "logit" or router.score_function == "softmax_topk" or bias is None
    changes = {
        "router.num_groups": router.num_groups > 1,
        "router.selection": router.selection not in ("score", "logit"),
        "router.score_function": not by_logit and router.score_function != "sigmoid",
        "router.logit_bias": router.logit_bias,
        "router.per_expert_scale": router.per_expert_scale,
        "router.capacity_factor": router.capacity_factor is not None,
        "router.round_to_tile": router.round_to_tile is not None,
        "router.pad_to_capacity": router.pad_to_capacity,
        "latent_norm": config.latent_norm == "pre",
    }
    if any(changes.values()):
        names = ", ".join(name for name, needs_more in changes.items() if needs_more)
        return f"XLA computes a step between the kernels because of {names}."
    decode = plan_decode(config, tokens, config.top_k, dtype, w_in, w_out, device=device)
    if isinstance(decode, str):
        return decode
    first = [weight for weight in (kernel, down_proj) if weight is not None]
    return OneToken(
        decode,
        parts_of(first, device.num_sms),
        1 if up_proj is None else parts_of([up_proj], device.num_sms),
        by_sigmoid=not by_logit,
        sigmoid=router.score_function == "sigmoid",
        eps=router.norm_topk_eps if router.norm_topk_prob else 0.0,
        factor=1.0 if config.apply_routed_scale_to_output else router.routed_scaling_factor,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def routed_token(
    plan: OneToken,
    config: LatentMoEConfig,
    usual: Callable[[Params, Float[Array, "1 d"]], Routed],
    params: Params,
    x: Float[Array, "1 d"],
) -> Routed:
    """One token's routed part in one call. If something is differentiated, `usual` runs.

    Args:
        plan: made for these parameters.
        config: the layer.
        usual: computes the same by separate calls.
        params: the layer's parameters.
        x: [1, d].
    """
    del usual
    kernel, bias, down_proj, w_in, w_out, up_proj = weights_of(config, params)
    decode, (experts, _, width), dtype = plan.decode, w_out.shape, x.dtype
    down = jnp.zeros((x.shape[1], 0), dtype) if down_proj is None else down_proj
    up = jnp.zeros((width, 0), dtype) if up_proj is None else up_proj
    operands = [x, kernel, down, jnp.zeros(0, jnp.float32) if bias is None else bias.astype(jnp.float32)]
    operands += [*stored_arrays(w_in), *stored_arrays(w_out), up]
    results = [
        jax.ShapeDtypeStruct((1, experts), jnp.float32),
        jax.ShapeDtypeStruct((1, down.shape[1]), dtype),
        jax.ShapeDtypeStruct((1, decode.choices), jnp.int32),
        jax.ShapeDtypeStruct((1, decode.choices), jnp.float32),
        *workspace(decode, dtype, w_out.shape),
        jax.ShapeDtypeStruct((1, up.shape[1]), dtype),
    ]
    found = native.call(
        "decode_token",
        operands,
        results,
        parts=plan.parts,
        up_parts=plan.up_parts,
        by_sigmoid=plan.by_sigmoid,
        sigmoid=plan.sigmoid,
        eps=plan.eps,
        factor=plan.factor,
        **attributes_of(decode),
    )
    logits, _, ids, weights, out, *_, projected = found
    return Routed(logits, ids, weights, out if up_proj is None else projected)


def _forward(plan, config, usual, params, x):
    del plan, config
    return vjp_of_perturbed(usual, params, x)


def _backward(plan, config, usual, residuals, gradients):
    del plan, config, usual
    return gradients_of_perturbed(residuals, gradients)


routed_token.defvjp(_forward, _backward, symbolic_zeros=True)


def explain(config: LatentMoEConfig, tokens: Any, params: Params, *, device: Device | None = None) -> str:
    """Whether one call runs the routed part where nothing is differentiated, or why not, in a line.

    It assumes tokens in config.dtype.

    Args:
        config: the layer.
        tokens: T, an integer unless it is a symbolic size of `jax.export`.
        params: the layer's parameters, or their shapes.
        device: the device that runs it; None is JAX's default device.
    """
    plan = plan_token(config, tokens, config.dtype, params, device=device)
    if isinstance(plan, str):
        return f"router, experts and projections run in separate calls: {plan}"
    return "router, experts and projections run in one call: each kernel is launched while the one before runs."
