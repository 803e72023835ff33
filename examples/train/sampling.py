"""Sampling with a key-value cache: one pass over the prompt, then one token a step, in one compiled loop."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from examples.train.model import CACHE, LanguageModel
from examples.train.step import TrainState, compiled_once, variables_of
from examples.train.tokenizer import Tokenizer


class Sample(NamedTuple):
    """A text and the speed at which it was written.

    Attributes:
        text: the prompt and its continuation.
        tokens_per_second: the tokens drawn over the time of the compiled loop, which includes reading the prompt.
    """

    text: bytes
    tokens_per_second: float


def prefill(model: LanguageModel, state: TrainState, tokens: Int[Array, "batch time"]) -> PyTree:
    """The cache of tokens at positions 0, 1, ...: each layer's keys and values at `time` positions.

    The tokens may end with padding, because `decode` overwrites a position before it reads it.
    """
    return cast(Any, model.apply(variables_of(state), tokens, mutable=[CACHE]))[1][CACHE]


def decode(
    model: LanguageModel, state: TrainState, cache: PyTree, tokens: Int[Array, " batch"], position: Int[Array, ""]
) -> tuple[Float[Array, "batch vocabulary"], PyTree]:
    """The logits after the tokens at one position, and the cache with these tokens.

    They equal the logits of `predict` on the whole prefix. This needs layers in which the batch does not affect a
    token. The trainer's layers are such, because no expert has a capacity. The correction bias is read and stays as it
    is.
    """
    variables = variables_of(state) | {CACHE: cache}
    logits, changed = cast(Any, model.apply(variables, tokens[:, None], position=position, mutable=[CACHE]))
    return logits[:, 0], changed[CACHE]


@compiled_once
def make_sample(model: LanguageModel, length: int) -> jax.stages.Wrapped:
    """The compiled loop. It continues `count` tokens at the beginning of `prompt` [context] by `length` tokens."""
    context = model.model.context
    kept = -(-context // 2)

    @jax.jit
    def sample(
        state: TrainState, prompt: Int[Array, " context"], count: Array, temperature: Array, key: Key[Array, ""]
    ) -> Int[Array, " length"]:
        keys = jax.random.split(key, length)
        last = count + length

        def window(carry):
            """Reads the newest tokens in one pass, and then draws until the context is full."""
            text, begin, end = carry
            begin = jnp.where(end - begin > context, end - kept, begin)
            cache = prefill(model, state, jax.lax.dynamic_slice(text, (begin,), (context,))[None])

            def draw(carry):
                text, end, cache = carry
                logits, cache = decode(model, state, cache, text[end - 1][None], end - 1 - begin)
                token = jax.random.categorical(keys[end - count], logits[0] / temperature)
                return text.at[end].set(token.astype(text.dtype)), end + 1, cache

            def goes_on(carry):
                return (carry[1] < last) & (carry[1] - begin <= context)

            text, end, _ = jax.lax.while_loop(goes_on, draw, (text, end, cache))
            return text, begin, end

        text = jnp.pad(prompt, (0, length + context))  # every slice of a window lies within the text
        text, _, _ = jax.lax.while_loop(lambda carry: carry[2] < last, window, (text, jnp.zeros_like(count), count))
        return jax.lax.dynamic_slice(text, (count,), (length,))

    return sample


def make_generate(
    model: LanguageModel, tokenizer: Tokenizer, length: int, temperature: float = 0.8
) -> Callable[[TrainState, bytes, Key[Array, ""]], Sample]:
    """A function of (state, prompt, key) that continues a prompt by `length` bytes. The same key gives the same bytes.

    Each token is drawn from softmax(logits / temperature). The model sees the last `context` tokens of the prompt and
    its own tokens since then. When these exceed its context, it goes on with the newer half of them.
    """
    context, sample = model.model.context, make_sample(model, length)

    def continued(state: TrainState, prompt: bytes, key: Key[Array, ""]) -> Sample:
        seen = np.append(tokenizer.separator, tokenizer.encode(prompt))[-context:]
        padded = np.zeros(context, np.int32)
        padded[: len(seen)] = seen
        arguments = state, padded, np.int32(len(seen)), np.float32(temperature), key
        compiled = sample.lower(*arguments).compile()
        began = time.monotonic()
        drawn = np.asarray(compiled(*arguments))
        speed = length / (time.monotonic() - began)
        return Sample(prompt + tokenizer.decode(drawn)[:length], speed)  # a token has at least one byte

    return continued
