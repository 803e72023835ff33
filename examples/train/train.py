"""The training run: main -> train -> steps, ending in plots, a sample and the validation bits per byte."""

import math
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np

from examples.train.checkpoint import Checkpoints, Snapshot
from examples.train.cli import parse
from examples.train.config import Config
from examples.train.corpus import Corpus, load_corpus
from examples.train.data import check_length, train_batches, validation_windows
from examples.train.errors import TrainError
from examples.train.finish import finish
from examples.train.metrics import Interval, MetricsWriter, ProgressReport
from examples.train.mlp import moe_config
from examples.train.model import LanguageModel
from examples.train.optimizer import learning_rate, make_optimizer
from examples.train.run_folder import open_folder
from examples.train.signals import StopRequest
from examples.train.step import TrainState, all_finite, init_state, make_bits_per_byte, make_train_step
from jax_latent_moe.errors import LatentMoEError

VALIDATION_WINDOWS = 128
"""Windows looked at during training; the end reads them all."""


def main(arguments: Sequence[str] | None = None):
    """Parses the command line, trains, and turns what the user can put right into one sentence."""
    try:
        train(parse(arguments))
    except (TrainError, LatentMoEError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted: the same command goes on from the newest checkpoint.")


def train(config: Config) -> float | None:
    """Trains, or goes on from the folder's newest checkpoint, and writes the run's plots and a sample.

    Returns:
        Validation bits per byte, or None where a signal stopped the run before its last step.

    Raises:
        TrainError: the data, the folder or the options are unusable, or the loss is not finite.
    """
    model = LanguageModel(config.model, moe_config(config))
    corpus = load_corpus(config.data)
    check_length(corpus, config.model.context)
    folder = open_folder(config)
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        with StopRequest() as stop:
            last = run_steps(config, model, corpus, checkpoints, stop)
    finally:
        checkpoints.close()
    done = int(last.state.step)
    if done < config.steps:
        print(f"Stopped by {stop.name} with step {done} of {config.steps} saved: the same command goes on from there.")
        return None
    return finish(config, model, corpus, last)


def run_steps(
    config: Config, model: LanguageModel, corpus: Corpus, checkpoints: Checkpoints, stop: StopRequest
) -> Snapshot:
    """Trains up to the last step, or to the first after a signal, and leaves a checkpoint of it.

    Raises:
        TrainError: the loss, the parameters or the optimiser are no longer finite: nothing of that is saved.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    batches = train_batches(corpus.train, config.model.context, config.batch_size, config.seed)
    snapshot = Snapshot(init_state(model, optimizer, config.seed), batches.get_state(), 0.0)
    if checkpoints.newest is not None:
        snapshot = checkpoints.restore(snapshot.state)
        batches.set_state(snapshot.data)
    state, first = snapshot.state, int(snapshot.state.step)
    report, writer = ProgressReport(config.steps, first), MetricsWriter(config.folder, first)
    report.say(description(config, state))

    train_step, bits_per_byte = make_train_step(model, optimizer), make_bits_per_byte(model, config.batch_size)
    windows = validation_windows(corpus.validation, config.model.context).subset(VALIDATION_WINDOWS)
    schedule = learning_rate(config.optimizer, config.steps)
    started = time.monotonic() - snapshot.seconds
    interval = Interval(config.batch_size * config.model.context)
    try:
        for step in range(first + 1, config.steps + 1):
            state, metrics = train_step(state, next(batches))
            interval.add(metrics)
            last = step == config.steps or stop.name is not None
            if step % config.log_every == 0 or last:
                record = interval.record(step, time.monotonic() - started, np.asarray(schedule(step)).item())
                if not math.isfinite(record["loss"]):
                    raise TrainError(diverged(step, checkpoints))
                writer.write(record)
                report.update(record)
            if step % config.eval_every == 0 or step == config.steps:
                with interval.paused():
                    bits = bits_per_byte(state, windows)
                seconds = time.monotonic() - started
                writer.write({"step": step, "seconds": seconds, "validation_bits_per_byte": bits})
                report.say(f"step {step}/{config.steps}  validation {bits:.3f} bits per byte")
            if step % config.checkpoint_every == 0 or last:
                with interval.paused():
                    if not all_finite((state.params, state.opt_state)):
                        raise TrainError(diverged(step, checkpoints))
                    checkpoints.save(Snapshot(state, batches.get_state(), time.monotonic() - started))
            if last:
                break
    finally:
        report.close()
        writer.close()
    return Snapshot(state, batches.get_state(), time.monotonic() - started)


def description(config: Config, state: TrainState) -> str:
    """What is trained, where, and from which step."""
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    begun = f"resumed at step {int(state.step)}" if state.step else "started"
    device = jax.devices()[0].device_kind
    return f"{config.mlp} with {size / 1e6:.2f} M parameters on {config.data}, {device}: {begun} in {config.folder}"


def diverged(step: int, checkpoints: Checkpoints) -> str:
    """The sentence for a run whose numbers are no longer finite."""
    newest = checkpoints.newest
    kept = "there is no checkpoint yet" if newest is None else f"the checkpoint of step {newest} is kept"
    return (
        f"The loss or the parameters are no longer finite at step {step}; {kept}: train with a lower "
        "--optimizer.learning-rate."
    )
