"""The training run: `main` parses the options, `train` prepares the run, `run_steps` is the loop."""

import contextlib
import dataclasses
import functools
import gc
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from examples.train.adapters import adapt, check_base, make_adapt
from examples.train.checkpoint import Checkpoints, Snapshot, has_checkpoint
from examples.train.cli import parse
from examples.train.config import Config
from examples.train.config_file import to_json
from examples.train.corpus import load_corpus, load_text
from examples.train.data import Ahead, ValidationWindows, check_length, held_out_windows, train_batches
from examples.train.errors import Diverged, TrainError
from examples.train.finish import finish
from examples.train.generate import load
from examples.train.interval import Interval
from examples.train.metrics import MetricsWriter, validation_field, write_texts
from examples.train.model import LanguageModel, language_model
from examples.train.optimizer import learning_rates, make_optimizer
from examples.train.placing import from_own_part, make_mesh
from examples.train.processes import any_process, first_line, is_first_process, leave, several_processes
from examples.train.profiling import Profile
from examples.train.programs import keep_programs
from examples.train.progress import ProgressReport, busy
from examples.train.run_folder import check_folder, open_folder
from examples.train.signals import INTERRUPTED, StopRequest
from examples.train.step import TrainState, all_finite, init_state_on, make_bits_per_byte, make_train_step, state_shapes
from examples.train.text import Corpus
from examples.train.tokenizer import Tokenizer, encode_corpus, open_tokenizer
from examples.train.trackers import Trackers, import_trackers
from jax_latent_moe.errors import ConfigError, LatentMoEError

VALIDATION_WINDOWS = 128
"""Number of windows of a text that a validation during training reads. The end of a run reads all of them."""


MakeProbe = Callable[[LanguageModel, ValidationWindows], Callable[[TrainState], dict[str, Any]]]
"""Makes a function of the state, whose fields each validation during training adds to its record. It gets the model
and the windows of the held-out text."""


class Trained(NamedTuple):
    """A run that has done its last step: the arguments of `finish` after the options."""

    model: LanguageModel
    corpus: Corpus
    tokenizer: Tokenizer
    last: Snapshot
    mesh: Mesh


def main(arguments: Sequence[str] | None = None):
    """Parses the command line and trains. An error that the user can solve is printed as one sentence.

    A run that a signal stops ends with the status of `StopRequest`.
    """
    stop = StopRequest()
    try:
        if train(parse(arguments), stop) is None:
            sys.exit(stop.status)
    except (TrainError, LatentMoEError) as error:
        leave(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if not several_processes():
            raise
        leave(
            f"error: a process of this run or the connection to it was lost ({first_line(error)}): start all processes "
            "again. They resume from the newest checkpoint."
        )
    except KeyboardInterrupt:
        print("Interrupted. The same command resumes from the newest checkpoint.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def train(config: Config, stop: StopRequest | None = None) -> float | None:
    """Trains from the start or from the newest checkpoint in the folder, and writes the figures and the report.

    Args:
        config: the options of the run.
        stop: notes a signal that stops the run.

    Returns:
        Validation bits per byte. None if a signal stopped the run before its last step.

    Raises:
        TrainError: the data, the folder or the options are unusable, or the loss is not finite.
    """
    trained = train_steps(config, stop=stop)
    return None if trained is None else finish(config, *trained)


def train_steps(config: Config, make_probe: MakeProbe | None = None, stop: StopRequest | None = None) -> Trained | None:
    """Trains from the start or from the newest checkpoint in the folder.

    Args:
        config: the options of the run.
        make_probe: adds fields to the records of validations.
        stop: notes a signal that stops the run. A caller may have entered it, to note those beyond the run too.

    Returns:
        None if a signal stopped the run before its last step.

    Raises:
        TrainError: the data, the folder or the options are unusable, or the loss is not finite.
    """
    mesh = make_mesh(config.mesh, config.batch_size, config.accumulate)
    model = language_model(config)  # raises for wrong options before anything takes time
    check_folder(config)
    base = read_base(config, model)
    trackers = import_trackers(config)
    with busy(f"Reading {config.data}"):
        corpus = read_corpus(config)
        tokenizer = open_tokenizer(config, corpus.train)
        model, tokens = language_model(config, tokenizer.vocabulary), encode_corpus(corpus, tokenizer)
    check_length(tokens, config.model.context, tokenizer.unit)
    folder, stop = open_folder(config), stop or StopRequest()
    keep_programs(folder)
    if is_first_process():
        tokenizer.save(folder)
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(stop)
            stack.enter_context(jax.set_mesh(mesh))
            last = run_steps(config, model, tokens, tokenizer, checkpoints, stop, mesh, trackers, make_probe, base)
    finally:
        checkpoints.close()
    done = int(last.state.step)
    if done < config.steps:
        if is_first_process():
            signal = stop.name or "a signal to another process"
            print(f"Stopped by {signal} with step {done} of {config.steps} saved. The same command resumes from there.")
        return None
    return Trained(model, corpus, tokenizer, last, mesh)


def read_corpus(config: Config) -> Corpus:
    """The texts that --data and --validation name.

    Raises:
        TrainError: a path does not exist, holds no text, or cannot be read. Or the plays are not installed.
    """
    column = config.data_column
    more = {
        name: load_text(path, column, f"--validation {name}={path}") for name, path in config.validation_paths.items()
    }
    return dataclasses.replace(load_corpus(config.data, column), more=more)


def read_base(config: Config, model: LanguageModel) -> TrainState | None:
    """The state of the run that --base names. None without --base, and for a run that has a checkpoint of its own.

    It is on the host and without the optimiser's state, so it takes no memory of the device.

    Raises:
        TrainError: the base is not a run with a checkpoint, or it does not fit the options.
    """
    if config.base is None or has_checkpoint(config.folder / "checkpoints"):
        return None
    check_base(config.base, config)
    base = jax.device_get(load(config.base)[1]._replace(opt_state=()))
    try:
        jax.eval_shape(functools.partial(adapt, model, make_optimizer(config.optimizer, config.steps), config), base)
    except ConfigError as error:
        raise TrainError(f"--base-format {config.base_format} does not fit the experts: {error}") from error
    return base


def run_steps(
    config: Config,
    model: LanguageModel,
    corpus: Corpus,
    tokenizer: Tokenizer,
    checkpoints: Checkpoints,
    stop: StopRequest,
    mesh: Mesh,
    trackers: Sequence[Any] = (),
    make_probe: MakeProbe | None = None,
    base: TrainState | None = None,
) -> Snapshot:
    """Trains until the last step or until a signal, and saves a checkpoint of the step that it ends with.

    Between two lines of metrics, the loop waits only for the step `IN_FLIGHT` before the newest.

    Args:
        config: the options of the run.
        model: the network.
        corpus: the texts in tokens.
        tokenizer: the tokenizer of the corpus.
        checkpoints: the checkpoints of the run.
        stop: tells whether a signal came.
        mesh: the mesh of state and batches.
        trackers: the modules of the trackers.
        make_probe: adds fields to the records of validations.
        base: the state to fine-tune, for the first steps of a run with --lora.

    Raises:
        TrainError: the loss, the parameters or the optimiser are no longer finite. Such a state is not saved.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    own = {"process": jax.process_index(), "processes": jax.process_count(), "documents": config.documents}
    batches = train_batches(corpus.train, config.model.context, config.batch_size, config.seed, **own)
    adapted = make_adapt(model, optimizer, config, mesh)
    if config.restore == "previous":
        checkpoints.drop_newest()
    if checkpoints.newest is None:
        with busy("Drawing the parameters"):
            state = init_state_on(model, optimizer, config.seed, mesh) if base is None else adapted(base)
            snapshot = Snapshot(state, batches.get_state(), 0.0)
    else:
        with busy("Restoring the checkpoint"):
            like = state_shapes(model, optimizer, mesh)
            snapshot = checkpoints.restore(jax.eval_shape(adapted, like) if config.lora else like)
        batches.set_state(snapshot.data)
    state, first = snapshot.state, int(snapshot.state.step)
    report = ProgressReport(config.steps)
    writer = MetricsWriter(config.folder, first, Trackers(trackers, config))
    write_texts(config.folder, {"options": to_json(config)}, first)
    report.say(description(config, model, state, mesh))

    policy = {"skip_bad": config.bad_step == "skip", "spike_factor": config.spike_factor}
    parts = {"accumulate": config.accumulate, "reduce_dtype": config.reduce_dtype, "adapters": config.lora > 0}
    train_step = make_train_step(model, optimizer, mesh, **policy, **parts)
    bits_per_byte = make_bits_per_byte(model, config.batch_size, mesh)
    windows = {
        name: held_out_windows(config, tokenizer, text).subset(VALIDATION_WINDOWS)
        for name, text in corpus.validations.items()
    }
    probe = None if make_probe is None else make_probe(model, windows[""])
    rates = learning_rates(config.optimizer, config.steps)
    # Several processes agree on a stop only at lines of metrics, because to agree they wait for each other.
    asks_every = config.log_every if several_processes() else 1
    ahead = Ahead(batches, lambda part: from_own_part(part, mesh))
    profile = Profile(config.profiled_steps, config.folder / "profile")
    bytes_per_token = tokenizer.bytes_per_token(corpus.validation.tokens)
    interval = Interval(config, model, mesh.size, bytes_per_token, snapshot.seconds)
    metrics = None
    gc.freeze()  # Python's garbage collector would search the many objects of the compiler during training
    try:
        for step in range(first + 1, config.steps + 1):
            profile.begin(step, metrics)
            compiles = step == first + 1
            with busy("Compiling, which takes seconds to minutes") if compiles else contextlib.nullcontext():
                state, metrics = train_step(state, next(ahead))
                interval.add(metrics)
            profile.end(step, metrics)
            last = step == config.steps or (step % asks_every == 0 and any_process(stop.name is not None))
            if step % config.log_every == 0 or last:
                record = interval.record(step, float(rates[step]))
                writer.write(record)
                report.update(record)
                judge(record, config, checkpoints)
                if record["bad_steps"]:
                    report.say(
                        f"step {step}/{config.steps}  {record['bad_steps']} bad step(s) skipped since the last line"
                    )
            if step % config.eval_every == 0 or step == config.steps:
                with interval.paused("validation"):
                    bits = {name: bits_per_byte(state, of_text) for name, of_text in windows.items()}
                    probed = {} if probe is None else probe(state)
                fields = {validation_field(name): value for name, value in bits.items()} | probed
                writer.write({"step": step, "seconds": interval.seconds, **fields})
                more = "".join(f", {name} {value:.3f}" for name, value in bits.items() if name)
                report.say(f"step {step}/{config.steps}  validation {bits['']:.3f} bits per byte{more}")
            if step % config.checkpoint_every == 0 or last:
                with interval.paused("checkpoint"):
                    if not all_finite((state.params, state.opt_state)):
                        raise Diverged(diverged(step, checkpoints))
                    checkpoints.save(Snapshot(state, ahead.get_state(), interval.seconds))
            if last:
                break
    finally:
        ahead.close()
        profile.close()
        report.close()
        writer.close()
        gc.unfreeze()
    return Snapshot(state, ahead.get_state(), interval.seconds)


def judge(record: dict[str, Any], config: Config, checkpoints: Checkpoints):
    """Ends a run whose loss is not finite, or that had a bad step without --bad-step skip.

    Raises:
        TrainError: the run must end. This includes an interval in which every step was bad.
    """
    if not math.isfinite(record["loss"]):
        raise Diverged(diverged(record["step"], checkpoints))
    if record["bad_steps"] and config.bad_step == "stop":
        raise Diverged(
            f"{record['bad_steps']} step(s) up to step {record['step']} had a gradient that is not finite or a loss "
            f"over {config.spike_factor:g} times the smoothed loss: --bad-step skip drops such steps."
        )


def description(config: Config, model: LanguageModel, state: TrainState, mesh: Mesh) -> str:
    """A line with the model, the text, the devices, the first step and the folder."""
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    begun = f"resumed at step {int(state.step)}" if state.step else "started"
    device = jax.devices()[0].device_kind
    if mesh.size > 1:
        axes = ", ".join(f"{axis}={width}" for axis, width in mesh.shape.items() if width > 1)
        device = f"{mesh.size} x {device} ({axes}), {jax.process_count()} process(es)"
    experts = ", experts in FP8" if config.precision == "fp8" else ""
    name = f"adapters of rank {config.lora} on {config.base}," if config.lora else config.mlp
    return (
        f"{name} with {size / 1e6:.2f} M parameters on {config.data}, {device}, "
        f"attention by {model.attention}, norms by {model.norms}{experts}: {begun} in {config.folder}"
    )


def diverged(step: int, checkpoints: Checkpoints) -> str:
    """The message of a run whose loss or parameters are not finite."""
    newest = checkpoints.newest
    kept = "there is no checkpoint yet" if newest is None else f"the checkpoint of step {newest} is kept"
    return (
        f"The loss or the parameters are no longer finite at step {step}, and {kept}: train with a lower "
        "--optimizer.learning-rate."
    )
