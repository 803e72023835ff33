"""Text from a trained model: `python -m examples.train.generate runs/shakespeare-cpu-latent_moe --prompt HAMLET`."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Key

from examples.train.checkpoint import Checkpoints
from examples.train.errors import TrainError
from examples.train.model import LanguageModel, language_model
from examples.train.optimizer import make_optimizer
from examples.train.ranges import RUN, check_number, check_text
from examples.train.run_folder import read_config, runs_here
from examples.train.step import TrainState, compiled_once, init_state, predict
from examples.train.tokenizer import Bytes, Tokenizer, load_tokenizer
from jax_latent_moe.errors import LatentMoEError


@compiled_once
def make_sample(model: LanguageModel, length: int, temperature: float):
    """The compiled part of `make_generate`. It continues a window of tokens by `length` tokens."""
    context = model.model.context

    @jax.jit
    def sample(state: TrainState, window: Array, filled: Array, key: Key[Array, ""]) -> Array:
        def draw(carry, key):
            window, filled = carry
            logits = predict(model, state, window[None])[0, filled - 1]
            token = jax.random.categorical(key, logits / temperature).astype(window.dtype)
            full = filled == context
            window = jnp.where(full, jnp.roll(window, -1), window)
            filled = jnp.where(full, filled, filled + 1)
            return (window.at[filled - 1].set(token), filled), token

        return jax.lax.scan(draw, (window, filled), jax.random.split(key, length))[1]

    return sample


def make_generate(
    model: LanguageModel, tokenizer: Tokenizer, length: int, temperature: float = 0.8
) -> Callable[..., bytes]:
    """A function of (state, prompt, key) that continues a prompt by `length` bytes. The same key gives the same bytes.

    Each token is drawn from softmax(logits / temperature). The model sees the last `context` tokens.
    """
    context, sample = model.model.context, make_sample(model, length, temperature)

    def continued(state: TrainState, prompt: bytes, key: Key[Array, ""]) -> bytes:
        seen = np.append(tokenizer.separator, tokenizer.encode(prompt))[-context:]
        window = np.zeros(context, np.int32)
        window[: len(seen)] = seen
        drawn = sample(state, jnp.asarray(window), jnp.asarray(len(seen)), key)
        return prompt + tokenizer.decode(np.asarray(drawn))[:length]  # a token has at least one byte

    return continued


def load(folder: Path) -> tuple[LanguageModel, TrainState, Tokenizer]:
    """The model of a run, its newest checkpoint and its tokenizer.

    Raises:
        TrainError: the folder holds no run, or no checkpoint that can be read.
    """
    config = read_config(folder)
    tokenizer = Bytes() if config.bpe_tokens is None else load_tokenizer(folder, config.bpe_tokens)
    # The attention of the run may not run on this machine.
    model = language_model(dataclasses.replace(config, attention="auto"), tokenizer.vocabulary)
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        if checkpoints.newest is None:
            raise TrainError(f"The run in {folder} has no checkpoint yet: train it until its first checkpoint.")
        optimizer = make_optimizer(config.optimizer, config.steps)
        shapes = jax.eval_shape(lambda: init_state(model, optimizer, config.seed))
        return model, checkpoints.restore(shapes).state, tokenizer
    finally:
        checkpoints.close()


def generate(
    run: tyro.conf.Positional[Path | None] = None,
    prompt: str = "",
    length: int = 400,
    temperature: float = 0.8,
    seed: int = 0,
):
    """Prints text that the model of a run writes. It reads the newest checkpoint.

    Args:
        run: folder of the run, such as runs/shakespeare-cpu-latent_moe.
        prompt: text to continue.
        length: number of bytes to write.
        temperature: a value below 1 favours likely bytes, a value above 1 unlikely ones.
        seed: seed of the text. Another seed gives another text.

    Raises:
        TrainError: the folder is missing or holds no run with a checkpoint, or another option is wrong.
    """
    if run is None:
        raise TrainError(
            f"Give the folder of a run: python -m examples.train.generate runs/NAME --prompt TEXT. {runs_here()}"
        )
    check_text("prompt", prompt)
    check_number("seed", seed, RUN["seed"])
    if length < 1 or not temperature > 0:
        raise TrainError(f"--length {length} must be at least 1, and --temperature {temperature} more than 0.")
    model, state, tokenizer = load(run)
    text = make_generate(model, tokenizer, length, temperature)(state, prompt.encode(), jax.random.key(seed))
    print(text.decode("utf-8", errors="replace"))


if __name__ == "__main__":
    try:
        tyro.cli(generate, prog="python -m examples.train.generate")
    except (TrainError, LatentMoEError) as error:
        sys.exit(f"error: {error}")
