"""Generation with a key-value cache: the logits and the text are those of full forward passes."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.train.initialising import shapes
from examples.train.mlp import moe_config
from examples.train.model import LanguageModel
from examples.train.presets import TOY
from examples.train.sampling import decode, make_generate, prefill
from examples.train.step import TrainState, predict
from examples.train.tokenizer import Bytes
from tests.tolerances import assert_close

SIZES = dataclasses.replace(TOY.model, context=13)
PROMPT = 5


@functools.cache
def model_and_state(mlp: str, scanned: bool):
    """A small model with random parameters and correction biases, which need no compilation."""
    sizes = dataclasses.replace(SIZES, layers=3 if scanned else 2)
    model = LanguageModel(sizes, moe_config(dataclasses.replace(TOY, model=sizes, mlp=mlp)), scan_layers=scanned)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype) / 4, nn.unbox(shapes(model)))
    zero = np.zeros((), np.float32)
    return model, TrainState(zero, drawn["params"], drawn.get("correction_bias", {}), (), zero, zero)


@functools.cache
def logits_of(model):
    return jax.jit(functools.partial(predict, model))


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("mlp", ["dense", "moe", "latent_moe"])
def test_every_step_has_the_logits_of_a_forward_pass_over_its_prefix(mlp, scanned, rng):
    model, state = model_and_state(mlp, scanned)
    tokens = rng.integers(0, 256, (2, SIZES.context))
    padded = np.where(np.arange(SIZES.context) < PROMPT, tokens, 7)

    @jax.jit
    def steps(state, tokens, padded):
        def step(cache, position):
            logits, cache = decode(model, state, cache, tokens[:, position], position)
            return cache, logits

        places = jnp.arange(PROMPT - 1, SIZES.context)
        return jax.lax.scan(step, prefill(model, state, padded), places)[1]

    expected = np.moveaxis(np.asarray(logits_of(model)(state, tokens)), 1, 0)[PROMPT - 1 :]
    for logits, whole in zip(steps(state, tokens, padded), expected, strict=True):
        assert_close(logits, whole, "float32")


def windows_of(seen, drawn: int):
    """The tokens that the model sees before each draw: all, until they exceed the context; then the newer half."""
    windows, begin, first = [], 0, len(seen) - drawn
    for end in range(first, len(seen)):
        if end - begin > SIZES.context:
            begin = end - (SIZES.context + 1) // 2
        windows.append(seen[begin:end])
    return windows


@pytest.mark.parametrize("temperature", [1e-6, 0.8])
@pytest.mark.parametrize("prompt", [b"", b"To be", b"A prompt that is longer than the context"])
def test_a_text_is_drawn_from_the_logits_of_forward_passes(temperature, prompt):
    """The oracle repeats full forward passes. At the low temperature each of them must give its likeliest byte."""
    length, key = 50, jax.random.key(3)
    model, state = model_and_state("latent_moe", False)
    text = make_generate(model, Bytes(), length, temperature)(state, prompt, key).text
    assert text.startswith(prompt)
    assert len(text) == len(prompt) + length
    seen = np.frombuffer(b"\n" + text, np.uint8).astype(np.int32)
    start = max(0, len(seen) - length - SIZES.context)  # a prompt's last tokens
    windows = windows_of(seen[start:], length)
    assert {len(window) for window in windows[-8:]} > {7, 12, 13}, "windows of half and of all of the context"
    padded = np.stack([np.pad(window, (0, SIZES.context - len(window))) for window in windows])
    logits = logits_of(model)(state, padded)[np.arange(length), [len(window) - 1 for window in windows]]
    drawn = jax.vmap(jax.random.categorical)(jax.random.split(key, length), logits / temperature)
    np.testing.assert_array_equal(drawn, seen[-length:])
    if temperature < 0.1:
        np.testing.assert_array_equal(np.argmax(logits, axis=-1), seen[-length:])


def test_another_key_gives_another_text():
    model, state = model_and_state("latent_moe", False)
    generate = make_generate(model, Bytes(), 50)
    texts = [generate(state, b"To be", jax.random.key(key)).text for key in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_cache_holds_the_context_in_the_dtype_of_the_model():
    model, state = model_and_state("latent_moe", True)
    narrow = (dataclasses.replace(part, dtype="bfloat16") for part in (model.model, model.moe))
    model = LanguageModel(*narrow, scan_layers=True)
    cache = jax.eval_shape(lambda: prefill(model, state, jnp.zeros((2, SIZES.context), jnp.int32)))
    width = SIZES.hidden_size // SIZES.heads
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == [
        *[(2, SIZES.context, SIZES.heads, width)] * 2,
        *[(2, 2, SIZES.context, SIZES.heads, width)] * 2,
    ]
