"""Text from a trained model: `python -m examples.train.generate runs/shakespeare-cpu-latent_moe --prompt HAMLET`."""

import dataclasses
import sys
from pathlib import Path

import jax
import optax
import tyro

from examples.train.adapters import adapt
from examples.train.checkpoint import Checkpoints
from examples.train.config import Config
from examples.train.errors import TrainError
from examples.train.model import LanguageModel, language_model
from examples.train.optimizer import make_optimizer
from examples.train.progress import busy
from examples.train.ranges import RUN, check_number, check_text
from examples.train.run_folder import read_config, runs_here
from examples.train.sampling import make_generate
from examples.train.step import TrainState, init_state
from examples.train.tokenizer import Bytes, Tokenizer, load_tokenizer
from jax_latent_moe.errors import LatentMoEError
from jax_latent_moe.piped import piped


def load(folder: Path) -> tuple[LanguageModel, TrainState, Tokenizer]:
    """The model of a run, its newest checkpoint and its tokenizer.

    Raises:
        TrainError: the folder holds no run, or no checkpoint that can be read.
    """
    config = read_config(folder)
    tokenizer = Bytes() if config.bpe_tokens is None else load_tokenizer(folder, config.bpe_tokens)
    # The attention and the norms of the run may not run on this machine.
    model = language_model(dataclasses.replace(config, attention="auto", norms="auto"), tokenizer.vocabulary)
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        if checkpoints.newest is None:
            raise TrainError(f"The run in {folder} has no checkpoint yet: train it until its first checkpoint.")
        optimizer = make_optimizer(config.optimizer, config.steps)
        shapes = jax.eval_shape(lambda: first_state(model, optimizer, config))
        return model, checkpoints.restore(shapes).state, tokenizer
    finally:
        checkpoints.close()


def first_state(model: LanguageModel, optimizer: optax.GradientTransformation, config: Config) -> TrainState:
    """A state of the form that a run of these options has, with adapters if it fine-tunes."""
    state = init_state(model, optimizer, config.seed)
    return adapt(model, optimizer, config, state) if config.lora else state


def generate(
    run: tyro.conf.Positional[Path | None] = None,
    prompt: str = "",
    length: int = 400,
    temperature: float = 0.8,
    seed: int = 0,
):
    """Prints text that the model of a run writes, and its speed to standard error. It reads the newest checkpoint.

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
    with busy("Compiling, which takes seconds to minutes, and writing the text", stderr=True):
        continued = make_generate(model, tokenizer, length, temperature)
        sample = continued(state, prompt.encode(), jax.random.key(seed))
    print(sample.text.decode("utf-8", errors="replace"))
    print(f"Written at {sample.tokens_per_second:,.0f} tokens/s.", file=sys.stderr)


if __name__ == "__main__":
    with piped():
        try:
            tyro.cli(generate, prog="python -m examples.train.generate")
        except (TrainError, LatentMoEError) as error:
            sys.exit(f"error: {error}")
