"""Activations of the experts, elementwise, in float32 (float64 for float64), from pre-activations to hidden rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.dtypes import at_least_float32


def activate(pre: Float[Array, "*rows two_m"], config: LatentMoEConfig) -> Float[Array, "*rows m"]:
    """Applies config.activation; a gated one reads the gate from the first half of the last axis, up from the second.

    Formulas, with g the gate and u the up half (or u alone):
        relu2: relu(u)^2 (NemotronH). gelu: gelu(u). swiglu: silu(g) * u (DeepSeek-V3, Qwen3). geglu: gelu(g) * u.
        situ_glu: b tanh(g / b) sigmoid(g) * bl tanh(u / bl), or * u where bl is None (Kimi K3).

    Args:
        pre: [..., m], or [..., 2 m] for gated activations.
        config: read for activation, gelu_approximate, situ_beta and situ_linear_beta.

    Returns:
        [..., m] in float32, or float64 for float64 input. Cast it to the compute dtype yourself.
    """
    pre = pre.astype(at_least_float32(pre.dtype))
    if not config.gated:
        return jnp.square(jax.nn.relu(pre)) if config.activation == "relu2" else _gelu(pre, config)
    gate, up = jnp.split(pre, 2, axis=-1)
    if config.activation == "swiglu":
        return jax.nn.silu(gate) * up
    if config.activation == "geglu":
        return _gelu(gate, config) * up
    assert config.activation == "situ_glu"
    if config.situ_linear_beta is not None:
        up = config.situ_linear_beta * jnp.tanh(up / config.situ_linear_beta)
    return config.situ_beta * jnp.tanh(gate / config.situ_beta) * jax.nn.sigmoid(gate) * up


def keeps_hidden(config: LatentMoEConfig) -> bool:
    """Whether the hidden rows alone tell the activation's slope, so that pre-activations need not be kept.

    relu2's slope is 2 relu(u) = 2 sqrt(h), to half of h's rounding error. In float16 hidden rows below 2^-24 vanish,
    and with them the slopes of pre-activations below 2^-12.
    """
    return config.activation == "relu2"


def activation_of_kept(
    kept: Float[Array, "*rows two_m"], config: LatentMoEConfig
) -> tuple[Float[Array, "*rows m"], Callable[[Float[Array, "*rows m"]], Float[Array, "*rows two_m"]]]:
    """The hidden rows and the map from their gradient to that of the pre-activation, from what a forward pass keeps.

    Args:
        kept: hidden rows where `keeps_hidden`, else the pre-activation.
        config: as for `activate`.

    Returns:
        Both in float32, or float64 for float64 input.
    """
    kept = kept.astype(at_least_float32(kept.dtype))
    if not keeps_hidden(config):
        hidden, vjp = jax.vjp(lambda pre: activate(pre, config), kept)
        return hidden, lambda dhidden: vjp(dhidden)[0]
    # The root at 0 is a constant, or its own derivative would be infinite there.
    root = jnp.where(kept > 0, jnp.sqrt(jnp.where(kept > 0, kept, 1)), 0)
    return kept, lambda dhidden: 2 * root * dhidden


def _gelu(x, config):
    return jax.nn.gelu(x, approximate=config.gelu_approximate)
