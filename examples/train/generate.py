"""Text from a trained model: `python -m examples.train.generate --run runs/shakespeare-cpu-latent_moe`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from examples.train.data import START
from examples.train.model import LanguageModel
from examples.train.step import TrainState


def make_generate(model: LanguageModel, length: int, temperature: float = 0.8) -> Callable[..., bytes]:
    """A function of (state, prompt, key) that continues a prompt by `length` bytes, the same for the same key.

    Each byte is drawn from softmax(logits / temperature), seen from the last `context` bytes.
    """
    context = model.model.context

    @functools.partial(jax.jit)
    def sample(state: TrainState, window: Array, filled: Array, key: Key[Array, ""]) -> Array:
        variables = {"params": state.params, "correction_bias": state.correction_bias}

        def draw(carry, key):
            window, filled = carry
            logits = model.apply(variables, window[None])[0, filled - 1]
            byte = jax.random.categorical(key, logits / temperature).astype(window.dtype)
            full = filled == context
            window = jnp.where(full, jnp.roll(window, -1), window)
            filled = jnp.where(full, filled, filled + 1)
            return (window.at[filled - 1].set(byte), filled), byte

        return jax.lax.scan(draw, (window, filled), jax.random.split(key, length))[1]

    def generate(state: TrainState, prompt: bytes, key: Key[Array, ""]) -> bytes:
        seen = np.frombuffer((bytes([START]) + prompt)[-context:], np.uint8)
        window = np.zeros(context, np.int32)
        window[: len(seen)] = seen
        drawn = sample(state, jnp.asarray(window), jnp.asarray(len(seen)), key)
        return prompt + bytes(np.asarray(drawn, np.uint8))

    return generate
