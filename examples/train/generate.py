"""Text from a trained model: `python -m examples.train.generate runs/shakespeare-cpu-latent_moe --prompt HAMLET`."""

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Key

from examples.train.checkpoint import Checkpoints
from examples.train.data import START
from examples.train.errors import TrainError
from examples.train.mlp import moe_config
from examples.train.model import LanguageModel
from examples.train.optimizer import make_optimizer
from examples.train.ranges import RUN, check_number, check_text
from examples.train.run_folder import read_config
from examples.train.step import TrainState, compiled_once, init_state, predict
from jax_latent_moe.errors import LatentMoEError


@compiled_once
def make_generate(model: LanguageModel, length: int, temperature: float = 0.8) -> Callable[..., bytes]:
    """A function of (state, prompt, key) that continues a prompt by `length` bytes, the same for the same key.

    Each byte is drawn from softmax(logits / temperature), seen from the last `context` bytes.
    """
    context = model.model.context

    @jax.jit
    def sample(state: TrainState, window: Array, filled: Array, key: Key[Array, ""]) -> Array:
        def draw(carry, key):
            window, filled = carry
            logits = predict(model, state, window[None])[0, filled - 1]
            byte = jax.random.categorical(key, logits / temperature).astype(window.dtype)
            full = filled == context
            window = jnp.where(full, jnp.roll(window, -1), window)
            filled = jnp.where(full, filled, filled + 1)
            return (window.at[filled - 1].set(byte), filled), byte

        return jax.lax.scan(draw, (window, filled), jax.random.split(key, length))[1]

    def continued(state: TrainState, prompt: bytes, key: Key[Array, ""]) -> bytes:
        seen = np.frombuffer((bytes([START]) + prompt)[-context:], np.uint8)
        window = np.zeros(context, np.int32)
        window[: len(seen)] = seen
        drawn = sample(state, jnp.asarray(window), jnp.asarray(len(seen)), key)
        return prompt + bytes(np.asarray(drawn, np.uint8))

    return continued


def load(folder: Path) -> tuple[LanguageModel, TrainState]:
    """The model of a run and its newest checkpoint.

    Raises:
        TrainError: the folder holds no run, or no checkpoint that can be read.
    """
    config = read_config(folder)
    model = LanguageModel(config.model, moe_config(config))
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        if checkpoints.newest is None:
            raise TrainError(f"The run in {folder} has no checkpoint yet: let it train to the first one.")
        optimizer = make_optimizer(config.optimizer, config.steps)
        shapes = jax.eval_shape(lambda: init_state(model, optimizer, config.seed))
        return model, checkpoints.restore(shapes).state
    finally:
        checkpoints.close()


def generate(
    run: tyro.conf.Positional[Path], prompt: str = "", length: int = 400, temperature: float = 0.8, seed: int = 0
):
    """Prints text from the newest checkpoint of a run.

    Args:
        run: folder of the run.
        prompt: text to continue.
        length: bytes to generate.
        temperature: below 1 the likely bytes become likelier.
        seed: another seed, another text.
    """
    check_text("prompt", prompt)
    check_number("seed", seed, RUN["seed"])
    if length < 1 or not temperature > 0:
        raise TrainError(f"--length {length} must be at least 1 and --temperature {temperature} more than 0.")
    model, state = load(run)
    text = make_generate(model, length, temperature)(state, prompt.encode(), jax.random.key(seed))
    print(text.decode("utf-8", errors="replace"))


if __name__ == "__main__":
    try:
        tyro.cli(generate, prog="python -m examples.train.generate")
    except (TrainError, LatentMoEError) as error:
        sys.exit(f"error: {error}")
