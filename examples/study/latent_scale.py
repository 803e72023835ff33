"""How large the latents are that the experts read: the claimed cause of what a norm changes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from examples.train.data import ValidationWindows
from examples.train.model import LanguageModel
from examples.train.step import TrainState, variables_of

FIELD = "latent_rms"
WINDOWS = 4
"""Number of windows of the held-out text that are read."""


def make_latent_rms(model: LanguageModel, windows: ValidationWindows) -> Callable[[TrainState], dict[str, Any]]:
    """A function that gives the root mean square of the latents in each latent MoE layer, after a norm before them.

    A fixed factor on the latent is not part of it. Models without a latent have no such field.

    Args:
        model: the network, with unrolled layers.
        windows: windows of the held-out text.
    """
    moe = model.moe
    if moe is None or moe.latent_size is None:
        return lambda state: {}
    tokens = jnp.asarray(windows.subset(WINDOWS).inputs, jnp.int32)

    @jax.jit
    def squares(state):
        capture = {"capture_intermediates": lambda module, _: module.name == "mlp_norm", "mutable": ["intermediates"]}
        sown: Any = model.apply(variables_of(state), tokens, **capture)[1]
        found = []
        for i in range(1, model.model.layers):
            params = state.params[f"block_{i:02d}"]["mlp"]
            _, x = sown["intermediates"][f"block_{i:02d}"]["mlp_norm"]["__call__"][0]
            latent = x.astype(jnp.float32) @ params["down_proj"]["kernel"]
            if moe.latent_norm == "pre":  # as the layer does: statistics of each token, then the learned scale
                mean = jnp.mean(jnp.square(latent), axis=-1, keepdims=True)
                latent *= jax.lax.rsqrt(mean + moe.latent_norm_eps) * params["latent_norm"]["scale"]
            found.append(jnp.mean(jnp.square(latent)))
        return jnp.sqrt(jnp.stack(found))

    return lambda state: {FIELD: [round(float(value), 5) for value in squares(state)]}
