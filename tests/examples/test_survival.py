"""How a run reacts to faults: bad steps, damaged checkpoints, a full disk."""

import dataclasses
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from examples.train import step as steps
from examples.train import train as training
from examples.train.errors import TrainError
from examples.train.metrics import read_records
from examples.train.mlp import moe_config
from examples.train.model import LanguageModel
from examples.train.optimizer import make_optimizer
from examples.train.placing import make_mesh
from examples.train.train import train
from tests.examples.runs import assert_same_bits, options, start, state_of, stopped_after, toy_config, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survival")
    write_text(folder)
    return folder


@pytest.fixture(autouse=True)
def without_end(monkeypatch):
    """No sample and no plots."""
    monkeypatch.setattr(training, "finish", lambda *_: None)


@pytest.mark.parametrize(
    ("loss", "norm", "smoothed", "factor", "bad"),
    [
        (2.0, 1.0, 1.0, 0.0, False),
        (np.nan, 1.0, 1.0, 0.0, True),
        (2.0, np.inf, 1.0, 0.0, True),
        (2.0, 1.0, 1.0, 1.5, True),
        (1.4, 1.0, 1.0, 1.5, False),
        (9.0, 1.0, np.nan, 1.5, False),  # the first step has nothing to be compared with
    ],
)
def test_which_step_is_bad(loss, norm, smoothed, factor, bad):
    assert bool(steps.is_bad(*map(jnp.float32, (loss, norm, smoothed)), factor)) == bad


def test_a_bad_step_is_skipped_and_logged(folder, monkeypatch):
    """It leaves parameters and optimiser as they were. A stand-in for `is_bad` finds the first step bad."""
    steps.make_train_step.cache_clear()
    monkeypatch.setattr(steps, "is_bad", lambda loss, grad_norm, smoothed, spike_factor: jnp.isnan(smoothed))
    config = toy_config(folder, run=folder / "skipping", log_every=1, bad_step="skip")
    with stopped_after(1):
        train(config)
    steps.make_train_step.cache_clear()
    after = state_of(config.folder)
    model, optimizer = LanguageModel(config.model, moe_config(config)), make_optimizer(config.optimizer, config.steps)
    first = steps.init_state_on(model, optimizer, config.seed, make_mesh("", config.batch_size))
    assert_same_bits(after, first._replace(step=after.step))
    assert int(after.step) == 1
    assert [record["bad_steps"] for record in read_records(config.folder) if "loss" in record] == [1]


def test_a_bad_step_ends_the_run_unless_it_is_skipped(folder):
    config, record = toy_config(folder), {"step": 7, "loss": 2.0, "bad_steps": 1}
    with pytest.raises(TrainError, match=r"1 step\(s\) up to step 7 .* --bad-step skip drops such steps"):
        training.judge(record, config, None)
    skipping = dataclasses.replace(config, bad_step="skip")
    training.judge(record, skipping, None)
    with pytest.raises(TrainError, match=r"no longer finite at step 7"):  # not one good step since the last line
        training.judge(record | {"loss": math.nan}, skipping, SimpleNamespace(newest=None))
    with pytest.raises(TrainError, match=r"spike_factor=0.5 must be more than 1"):
        dataclasses.replace(config, spike_factor=0.5)


def test_a_damaged_checkpoint_is_left_for_the_one_before_it(folder):
    config = toy_config(folder, run=folder / "damaged", checkpoint_every=3)
    with stopped_after(6):
        train(config)
    whole = state_of(config.folder)
    for path in (config.folder / "checkpoints" / "6" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(TrainError, match=r"checkpoints/6 is damaged.*--restore previous"):
        train(config)
    with stopped_after(3):
        train(dataclasses.replace(config, restore="previous"))
    assert_same_bits(state_of(config.folder), whole)

    with pytest.raises(TrainError, match=r"--restore previous needs two checkpoints, and .* holds 0"):
        train(toy_config(folder, run=folder / "none", restore="previous"))


def test_a_full_disk_ends_the_run_in_one_sentence(folder):
    """A limit on file sizes stands for the disk. The first checkpoint exceeds it."""
    config = toy_config(folder, run=folder / "full", log_every=1, checkpoint_every=1)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))"
    with start(*options(config), before=limit) as run:
        output = run.communicate(timeout=300)[0]
    assert run.returncode == 1, output
    (last,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert last.startswith("error: A checkpoint cannot be written to"), output
    assert "free some space there" in last
