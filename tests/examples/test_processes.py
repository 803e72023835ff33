"""Several processes over gloo train as one process, end together if one is lost, and are resumed by one process."""

import dataclasses
import signal
import time

import numpy as np
import pytest

from examples.train import processes as joining
from examples.train import train as training
from examples.train.metrics import read_records
from examples.train.train import train
from tests.examples.runs import state_of, stopped_after, together, toy_config, wait_for, write_text
from tests.parallel.meshes import WHOLE_MATRIX
from tests.tolerances import assert_close


def test_two_processes_train_as_one_and_one_goes_on(tmp_path, monkeypatch):
    """SIGTERM to one of them stops both after a checkpoint. Then one process with one device resumes the run."""
    monkeypatch.setattr(training, "finish", lambda *_: None)
    write_text(tmp_path)
    alone = toy_config(tmp_path, run=tmp_path / "alone", steps=2000, log_every=1, checkpoint_every=1000)
    shared = dataclasses.replace(alone, run=tmp_path / "shared", mesh="expert=2")
    with together(shared, 2) as (first, second):
        wait_for(first, "step 5/")
        second.send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=240)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [128 + signal.SIGTERM] * 2, outputs
    assert "Stopped by" in outputs[0]
    assert "step " not in outputs[1], "only process 0 prints"
    stopped_at = int(state_of(shared.folder).step)
    losses = [record["loss"] for record in read_records(shared.folder)]
    assert 5 <= stopped_at == len(losses)
    for run, steps in ((alone.run, stopped_at), (shared.run, 2)):
        with stopped_after(steps):
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
    """A broken connection ends the others at once. A process that hangs ends them when its heartbeats are missed."""
    write_text(tmp_path)
    config = toy_config(tmp_path, mesh="expert=2", steps=2000, log_every=1, checkpoint_every=1000)
    assert joining.LOST_AFTER_SECONDS == 30, "docs/training.md says within a minute"
    sooner = "import examples.train.processes as joining; joining.LOST_AFTER_SECONDS = 10"
    with together(config, 2, before=sooner) as (first, second):
        wait_for(first, "step 3/")
        second.send_signal(signal_number)
        lost = time.monotonic()
        output = first.communicate(timeout=120)[0]
    assert time.monotonic() - lost < 60
    assert first.returncode != 0
    assert all(words in output for words in messages), output
