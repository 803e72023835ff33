"""The training run: main -> train -> steps, ending in plots, a sample and the validation bits per byte."""

import gc
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from examples.train.checkpoint import Checkpoints, Snapshot
from examples.train.cli import parse
from examples.train.config import Config
from examples.train.corpus import load_corpus
from examples.train.data import Ahead, check_length, held_out_windows, train_batches
from examples.train.errors import TrainError
from examples.train.finish import finish
from examples.train.metrics import Interval, MetricsWriter, ProgressReport
from examples.train.model import LanguageModel, language_model
from examples.train.optimizer import learning_rates, make_optimizer
from examples.train.placing import from_own_part, make_mesh
from examples.train.processes import any_process, first_line, is_first_process, leave, several_processes
from examples.train.profiling import Profile
from examples.train.run_folder import check_folder, open_folder
from examples.train.signals import StopRequest
from examples.train.step import TrainState, all_finite, init_state_on, make_bits_per_byte, make_train_step
from examples.train.text import Corpus
from examples.train.tokenizer import Tokenizer, open_tokenizer
from examples.train.trackers import Trackers, import_trackers
from jax_latent_moe.errors import LatentMoEError

VALIDATION_WINDOWS = 128
"""Windows looked at during training; the end reads them all."""


def main(arguments: Sequence[str] | None = None):
    """Parses the command line, trains, and turns what the user can put right into one sentence."""
    try:
        train(parse(arguments))
    except (TrainError, LatentMoEError) as error:
        leave(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if not several_processes():
            raise
        leave(
            f"error: a process of this run was lost, or the way to it ({first_line(error)}): start all of them again, "
            "and they go on from the newest checkpoint."
        )
    except KeyboardInterrupt:
        sys.exit("Interrupted: the same command goes on from the newest checkpoint.")


def train(config: Config) -> float | None:
    """Trains, or goes on from the folder's newest checkpoint, and writes the run's plots and a sample.

    Returns:
        Validation bits per byte, or None where a signal stopped the run before its last step.

    Raises:
        TrainError: the data, the folder or the options are unusable, or the loss is not finite.
    """
    mesh = make_mesh(config.mesh, config.batch_size, config.accumulate)
    language_model(config)  # says what is wrong with the options before anything takes time
    check_folder(config)
    trackers = import_trackers(config)
    corpus = load_corpus(config.data, config.data_column)
    tokenizer = open_tokenizer(config, corpus.train)
    model, tokens = language_model(config, tokenizer.vocabulary), tokenizer.corpus(corpus)
    check_length(tokens, config.model.context, tokenizer.unit)
    folder = open_folder(config)
    if is_first_process():
        tokenizer.save(folder)
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        with StopRequest() as stop, jax.set_mesh(mesh):
            last = run_steps(config, model, tokens, tokenizer, checkpoints, stop, mesh, trackers)
    finally:
        checkpoints.close()
    done = int(last.state.step)
    if done < config.steps:
        if is_first_process():
            signal = stop.name or "a signal to another process"
            print(f"Stopped by {signal} with step {done} of {config.steps} saved: the same command goes on from there.")
        return None
    return finish(config, model, corpus, tokenizer, last, mesh)


def run_steps(
    config: Config,
    model: LanguageModel,
    corpus: Corpus,
    tokenizer: Tokenizer,
    checkpoints: Checkpoints,
    stop: StopRequest,
    mesh: Mesh,
    trackers: Sequence[Any] = (),
) -> Snapshot:
    """Trains up to the last step, or to the first after a signal, and leaves a checkpoint of it.

    Nothing waits for the device between two lines of metrics, but for the step `IN_FLIGHT` before the newest.

    Args:
        config: of the run.
        model: the network.
        corpus: in tokens.
        tokenizer: of the corpus.
        checkpoints: of the run.
        stop: says whether a signal came.
        mesh: where state and batches lie.
        trackers: packages that take metrics, imported.

    Raises:
        TrainError: the loss, the parameters or the optimiser are no longer finite: nothing of that is saved.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    own = {"process": jax.process_index(), "processes": jax.process_count(), "documents": config.documents}
    batches = train_batches(corpus.train, config.model.context, config.batch_size, config.seed, **own)
    snapshot = Snapshot(init_state_on(model, optimizer, config.seed, mesh), batches.get_state(), 0.0)
    if config.restore == "previous":
        checkpoints.drop_newest()
    if checkpoints.newest is not None:
        snapshot = checkpoints.restore(snapshot.state)
        batches.set_state(snapshot.data)
    state, first = snapshot.state, int(snapshot.state.step)
    report = ProgressReport(config.steps)
    writer = MetricsWriter(config.folder, first, Trackers(trackers, config))
    report.say(description(config, model, state, mesh))

    policy = {"skip_bad": config.bad_step == "skip", "spike_factor": config.spike_factor}
    train_step = make_train_step(model, optimizer, mesh, **policy, accumulate=config.accumulate)
    bits_per_byte = make_bits_per_byte(model, config.batch_size, mesh)
    windows = held_out_windows(config, tokenizer, corpus.validation).subset(VALIDATION_WINDOWS)
    rates = learning_rates(config.optimizer, config.steps)
    # Several processes agree on whether to stop at lines of metrics alone: to agree is to wait for each other.
    asks_every = config.log_every if several_processes() else 1
    ahead = Ahead(batches, lambda part: from_own_part(part, mesh))
    profile = Profile(config.profiled_steps, config.folder / "profile")
    started = time.monotonic() - snapshot.seconds
    interval = Interval(config, model, mesh.size, first, tokenizer.bytes_per_token(corpus.validation.tokens))
    metrics = None
    gc.freeze()  # or every third line or so would wait for Python to look through all that compiling has left behind
    try:
        for step in range(first + 1, config.steps + 1):
            profile.begin(step, metrics)
            state, metrics = train_step(state, next(ahead))
            interval.add(metrics)
            profile.end(step, metrics)
            last = step == config.steps or (step % asks_every == 0 and any_process(stop.name is not None))
            if step % config.log_every == 0 or last:
                record = interval.record(step, time.monotonic() - started, float(rates[step]))
                writer.write(record)
                report.update(record)
                judge(record, config, checkpoints)
                if record["bad_steps"]:
                    report.say(
                        f"step {step}/{config.steps}  {record['bad_steps']} bad step(s) skipped since the last line"
                    )
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
                    checkpoints.save(Snapshot(state, ahead.get_state(), time.monotonic() - started))
            if last:
                break
    finally:
        ahead.close()
        profile.close()
        report.close()
        writer.close()
        gc.unfreeze()
    return Snapshot(state, ahead.get_state(), time.monotonic() - started)


def judge(record: dict[str, Any], config: Config, checkpoints: Checkpoints):
    """Ends a run whose loss is not finite, or that had a bad step which its options do not skip.

    Raises:
        TrainError: it did, or skipped every step of an interval.
    """
    if not math.isfinite(record["loss"]):
        raise TrainError(diverged(record["step"], checkpoints))
    if record["bad_steps"] and config.bad_step == "stop":
        raise TrainError(
            f"{record['bad_steps']} step(s) up to step {record['step']} had a gradient that is not finite or a loss "
            f"over {config.spike_factor:g} times the smoothed one: --bad-step skip leaves such steps out."
        )


def description(config: Config, model: LanguageModel, state: TrainState, mesh: Mesh) -> str:
    """What is trained, where, and from which step."""
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    begun = f"resumed at step {int(state.step)}" if state.step else "started"
    device = jax.devices()[0].device_kind
    if mesh.size > 1:
        axes = ", ".join(f"{axis}={width}" for axis, width in mesh.shape.items() if width > 1)
        device = f"{mesh.size} x {device} ({axes}), {jax.process_count()} process(es)"
    return (
        f"{config.mlp} with {size / 1e6:.2f} M parameters on {config.data}, {device}, attention by {model.attention}: "
        f"{begun} in {config.folder}"
    )


def diverged(step: int, checkpoints: Checkpoints) -> str:
    """The sentence for a run whose numbers are no longer finite."""
    newest = checkpoints.newest
    kept = "there is no checkpoint yet" if newest is None else f"the checkpoint of step {newest} is kept"
    return (
        f"The loss or the parameters are no longer finite at step {step}; {kept}: train with a lower "
        "--optimizer.learning-rate."
    )
