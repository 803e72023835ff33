"""Does the runs of a study that have no row yet. A run that was stopped goes on from its newest checkpoint.

Several processes may work on one folder, each on its own GPU: a process holds the lock of the run that it does.
"""

import contextlib
import hashlib
import importlib.metadata
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from examples.study import data, rows
from examples.study.curves import curves
from examples.study.definition import SWEEP_SEED, Run, Study, config_of, missing, queue
from examples.study.latent_scale import make_latent_rms
from examples.study.locks import locked
from examples.train.config import Config
from examples.train.errors import Diverged, TrainError
from examples.train.finish import validate
from examples.train.flops import flops_per_token
from examples.train.initialising import shapes
from examples.train.model import language_model
from examples.train.progress import busy
from examples.train.signals import StopRequest
from examples.train.text import Corpus
from examples.train.train import read_corpus, train_steps
from jax_latent_moe import __version__

POLL = 1.0
"""Seconds between two looks at the rows while other processes do all runs that can be done."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def run_study(
    study: Study,
    folder: Path,
    scratch: Path,
    text: data.Files | None,
    only: Sequence[str] = (),
    stop: StopRequest | None = None,
) -> bool:
    """Does the missing runs in the order of the queue, except runs of other processes, and appends a row for each.

    Args:
        study: the definition.
        folder: holds the rows.
        scratch: the folder of the trainer's run folders. Checkpoints are deleted when their run has its row.
        text: the files of the text. None is a text that the trainer knows by name.
        only: the arms to run. Empty runs all. The sweep runs for all.
        stop: notes a signal that stops the queue.

    Returns:
        False if a signal stopped it.

    Raises:
        TrainError: the rows or the text do not fit the study, or a run fails.
    """
    path, checked = folder / rows.FILE, None
    for place in (folder, scratch):
        place.mkdir(parents=True, exist_ok=True)

    def left() -> list[Run]:
        done = rows.read_rows(path, study)
        found = missing(queue(study, rows.bits_of(done)), done)
        return [run for run in found if not only or run.arm in only or run.seed == SWEEP_SEED]

    with stop or StopRequest() as stop:
        while stop.name is None:
            if not (runs := left()):
                return True
            with first_free(runs, scratch) as run:
                if run is None:
                    time.sleep(POLL)
                    continue
                if run not in left():  # another process has done it meanwhile
                    continue
                config = config_of(study, run, text, scratch / run.name)
                checked = checked or check_text(study, config)
                print(f"\n{run.name}: {len(runs)} run(s) of {study.name} left", flush=True)
                row = run_one(study, run, config, stop)
                if row is None:
                    return False
                rows.append_row(path, row)
                shutil.rmtree(scratch / run.name / "checkpoints", ignore_errors=True)
    return False


@contextlib.contextmanager
def first_free(runs: Sequence[Run], scratch: Path) -> Iterator[Run | None]:
    """Holds the lock of the first run that no other process does. None if others do all."""
    for run in runs:
        with locked(scratch / f"{run.name}.lock", wait=False) as held:
            if held:
                yield run
                return
    yield None


def check_text(study: Study, config: Config) -> str:
    """The checksum of the text.

    Raises:
        TrainError: it is not the study's.
    """
    with busy(f"Checking {config.data}"):
        found = checksum(read_corpus(config))
    if found != study.text_sha256:
        raise TrainError(
            f"The text {config.data} has the SHA-256 {found} and must have {study.text_sha256}: fetch it again."
        )
    return found


def checksum(corpus: Corpus) -> str:
    """SHA-256 of the bytes to train on, followed by the bytes of each text to validate on."""
    digest = hashlib.sha256(np.ascontiguousarray(corpus.train.tokens))
    for _, text in sorted(corpus.validations.items()):
        digest.update(np.ascontiguousarray(text.tokens))
    return digest.hexdigest()


def run_one(study: Study, run: Run, config: Config, stop: StopRequest) -> rows.Row | None:
    """Trains and validates, and returns the row. None if a signal stopped the run.

    Raises:
        TrainError: the run fails for another reason than that it diverged.
    """
    try:
        trained = train_steps(config, make_latent_rms, stop)
        if trained is None:
            return None
        bits = validate(config, *trained, study.validation_windows)[1]
        bits_per_byte = bits.get(data.HELD_OUT, bits[""])
    except Diverged as error:
        print(f"{run.name} diverged. {error}")
        bits_per_byte = None
    row = {
        "study": study.name,
        **run._asdict(),
        "config": rows.definition_of(study, run),
        "text_sha256": study.text_sha256,
        "validation_bits_per_byte": bits_per_byte,
        **costs(config),
        **curves(config),
        "device": jax.local_devices()[0].device_kind,
        "versions": versions(),
    }
    print(f"{run.name}: {'diverged' if bits_per_byte is None else f'{bits_per_byte:.4f} bits per byte'}", flush=True)
    return row


def costs(config: Config) -> dict[str, int]:
    """Parameters, active operations of a token in training, and operations of the whole run."""
    model = language_model(config)
    params = jax.tree.leaves(shapes(model)["params"])
    flops = flops_per_token(model)
    return {
        "parameters": sum(leaf.size for leaf in params),
        "active_flops_per_token": flops,
        "run_flops": flops * config.steps * config.batch_size * config.model.context,
    }


def versions() -> dict[str, str]:
    """The versions of the software that computes a run."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"jax_latent_moe": __version__, **found, "python": platform.python_version()}
