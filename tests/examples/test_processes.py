"""Several real processes over gloo: the same run as in one, gone on with by one, ended together when one is lost."""

import dataclasses
import signal
import time

import numpy as np
import pytest

from examples.train import train as training
from examples.train.metrics import read_records
from examples.train.processes import LOST_AFTER_SECONDS
from examples.train.train import train
from tests.examples.runs import state_of, together, toy_config, wait_for, write_text
from tests.parallel.meshes import WHOLE_MATRIX
from tests.tolerances import assert_close


def test_two_processes_train_as_one_and_one_goes_on(tmp_path, monkeypatch):
    """SIGTERM to one of them saves in both; the run is then gone on with by one process on one device."""
    monkeypatch.setattr(training, "finish", lambda *_: None)
    write_text(tmp_path)
    alone = toy_config(tmp_path, run=tmp_path / "alone", steps=2000, log_every=1, checkpoint_every=1000)
    shared = dataclasses.replace(alone, run=tmp_path / "shared", mesh="expert=2")
    with together(shared, 2) as (first, second):
        wait_for(first, "step 5/")
        second.send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=240)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert "Stopped by" in outputs[0]
    assert "step " not in outputs[1], "only process 0 prints"
    stopped_at = int(state_of(shared.folder).step)
    losses = [record["loss"] for record in read_records(shared.folder)]
    assert 5 <= stopped_at == len(losses)

    class StopAt(training.StopRequest):
        """Asks to stop at once after each step until the given number is asked for."""

        def __init__(self, steps):
            super().__init__()
            self.left = steps

        def note_step(self):
            self.left -= 1
            self.name = "SIGTERM" if self.left <= 0 else None

    def any_process(here):
        del here
        stop.note_step()
        return stop.name is not None

    monkeypatch.setattr(training, "any_process", any_process)
    for run, steps in ((alone.run, stopped_at), (shared.run, 2)):
        stop = StopAt(steps)
        monkeypatch.setattr(training, "StopRequest", lambda stop=stop: stop)
        train(dataclasses.replace(alone, run=run))
    wanted = [record["loss"] for record in read_records(alone.folder)]
    np.testing.assert_allclose(losses, wanted, rtol=1e-3)
    assert int(state_of(shared.folder).step) == stopped_at + 2


@pytest.mark.skipif(not WHOLE_MATRIX, reason="takes minutes on two cores: JAX_LATENT_MOE_ALL_MESHES=1 runs it")
def test_four_processes_train_as_one(tmp_path, monkeypatch):
    write_text(tmp_path)
    alone = toy_config(tmp_path, run=tmp_path / "alone", steps=4, log_every=1, checkpoint_every=4, sample_bytes=4)
    shared = dataclasses.replace(alone, run=tmp_path / "shared", mesh="data=2,expert=2")
    with together(shared, 4) as processes:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert not any("step " in output for output in outputs[1:]), "only process 0 prints"
    monkeypatch.setattr(training, "finish", lambda *_: None)
    train(alone)
    for name in ("loss", "auxiliary_loss", "grad_norm"):
        losses, wanted = ([r[name] for r in read_records(c.folder) if name in r] for c in (shared, alone))
        assert_close(losses, wanted, "float32", name)


@pytest.mark.parametrize(
    ("signal_number", "messages"),
    [
        (
            signal.SIGKILL,
            ("error: a process of this run or the connection to it was lost", "start all"),
        ),
        (signal.SIGSTOP, ("stopped sending heartbeats", "another task died")),  # JAX's own words
    ],
)
def test_a_lost_process_ends_the_others(tmp_path, signal_number, messages):
    """At once where its connections break; one that hangs, once its heartbeats are missed."""
    write_text(tmp_path)
    config = toy_config(tmp_path, mesh="data=2", steps=100_000, log_every=1, checkpoint_every=100_000)
    with together(config, 2) as (first, second):
        wait_for(first, "step 3/")
        second.send_signal(signal_number)
        lost = time.monotonic()
        output = first.communicate(timeout=4 * LOST_AFTER_SECONDS)[0]
    assert time.monotonic() - lost < 3 * LOST_AFTER_SECONDS
    assert first.returncode != 0
    assert all(words in output for words in messages), output
