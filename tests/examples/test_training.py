"""Whole runs in this process: they learn, resume to the bit, and stop where numbers are no longer finite."""

import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pytest

from examples.train import train as training
from examples.train.errors import TrainError
from examples.train.metrics import read_records
from examples.train.train import train
from tests.examples.runs import assert_same_bits, state_of, toy_config, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """A run of 40 steps without interruption, with checkpoints on its way."""
    config = toy_config(folder, steps=40, checkpoint_every=10, run=folder / "finished")
    return config, train(config)


def test_learns(finished):
    config, bits = finished
    losses = [record["loss"] for record in read_records(config.folder) if "loss" in record]
    assert losses[-1] < 0.6 * losses[0]
    assert bits < 0.6 * math.log2(256)


def test_writes_what_it_promises(finished, capsys):
    config, bits = finished
    for name in ("loss.png", "expert_load.png"):
        assert (config.folder / name).read_bytes().startswith(b"\x89PNG")
    assert len((config.folder / "sample.txt").read_bytes()) >= config.sample_bytes
    assert list((config.folder / "tensorboard").iterdir())
    # A second run finds nothing left to do and says the same.
    assert train(config) == bits
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.fullmatch(
        r"Validation: [\d.]+ bits per byte after 40 steps and \d+ s of training; "
        r"the text alone takes xz -9e [\d.]+, bzip2 -9 [\d.]+\.",
        last,
    )
    assert f"{bits:.3f}" in last


def test_loads_are_shares_and_move_the_correction_bias(finished):
    config, _ = finished
    loads = np.asarray([record["loads"] for record in read_records(config.folder) if "loads" in record])
    assert loads.shape[1:] == (config.model.layers - 1, config.model.num_experts)
    np.testing.assert_allclose(loads.sum(axis=-1), 1, atol=1e-4)
    (bias,) = (block["mlp"]["router"]["bias"] for block in state_of(config.folder).correction_bias.values())
    assert np.any(bias)
    assert np.abs(bias).max() <= config.steps * config.bias_update_rate * (1 + 1e-5)


def test_resumed_run_is_the_same_to_the_bit(folder, finished):
    config, bits = finished
    resumed = dataclasses.replace(config, run=folder / "resumed")

    class StopAt(training.StopRequest):
        """Asks to stop after the 17th step, in the middle of everything."""

        def __init__(self):
            super().__init__()
            self.asked = 0

        @property
        def name(self):
            self.asked += 1
            return "SIGTERM" if self.asked > 16 else None

        @name.setter
        def name(self, value):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "StopRequest", StopAt)
        assert train(resumed) is None
    assert int(state_of(resumed.folder).step) == 17
    assert train(resumed) == bits
    assert_same_bits(state_of(resumed.folder), state_of(config.folder))
    steps = [record["step"] for record in read_records(resumed.folder) if "loss" in record]
    assert steps == sorted(set(steps))


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(folder):
    config = toy_config(folder, run=folder / "diverging", steps=10, checkpoint_every=5, mlp="dense")
    train(config)
    state = state_of(config.folder)
    faster = dataclasses.replace(config.optimizer, learning_rate=1e15)
    again = dataclasses.replace(config, steps=40, log_every=1, optimizer=faster)
    with pytest.raises(TrainError, match=r"no longer finite at step \d+; the checkpoint of step 10 is kept"):
        train(again)
    assert_same_bits(state_of(config.folder), state)


def test_other_options_do_not_resume(folder, finished):
    config, _ = finished
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden_size=64))
    with pytest.raises(TrainError, match=r"model\.hidden_size=32, now 64"):
        train(wider)


def test_damaged_checkpoint_is_named(folder, finished):
    config, _ = finished
    copy = dataclasses.replace(config, run=folder / "damaged")
    shutil.copytree(config.folder, copy.folder)
    for path in (copy.folder / "checkpoints" / "40" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(TrainError, match=r"checkpoints/40 is damaged.*--restore previous deletes it"):
        train(copy)


def test_records_cut_off_by_a_kill_are_dropped(folder, finished):
    config, _ = finished
    copy = folder / "cut"
    copy.mkdir()
    lines = (config.folder / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(lines[:-10])
    assert read_records(copy) == [json.loads(line) for line in lines.splitlines()[:-1]]
