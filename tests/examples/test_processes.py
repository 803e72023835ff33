"""Several real processes over gloo: the same run as in one, gone on with by one, ended together when one is lost."""

import contextlib
import dataclasses
import signal
import socket
import time

import numpy as np

from examples.train import train as training
from examples.train.metrics import read_records
from examples.train.processes import LOST_AFTER_SECONDS
from examples.train.train import train
from tests.examples.runs import start, state_of, toy_config, wait_for, write_text


@contextlib.contextmanager
def together(config, processes, mesh):
    """The trainer in that many processes, each with one device; none of them outlives the test."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    fields = {"preset": "toy", "data": config.data, "run": config.run, "steps": config.steps, "mesh": mesh}
    fields |= {"checkpoint-every": config.checkpoint_every, "log-every": config.log_every, "sample-bytes": 4}
    fields |= {"coordinator": address, "processes": processes}
    options = [text for name, value in fields.items() for text in (f"--{name}", value)]
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(start(*options, "--process", i)) for i in range(processes)]
        try:
            yield started
        finally:
            for process in started:
                process.kill()


def test_two_processes_train_as_one_and_one_goes_on(tmp_path, monkeypatch):
    """SIGTERM to one of them saves in both; the run is then gone on with by one process on one device."""
    monkeypatch.setattr(training, "finish", lambda *_: None)
    write_text(tmp_path)
    shared = toy_config(tmp_path, run=tmp_path / "shared", steps=2000, log_every=1, checkpoint_every=1000)
    with together(shared, 2, "expert=2") as (first, second):
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
    for folder, steps in ((tmp_path / "alone", stopped_at), (shared.folder, 2)):
        stop = StopAt(steps)
        monkeypatch.setattr(training, "StopRequest", lambda stop=stop: stop)
        train(dataclasses.replace(shared, run=folder))
    alone = [record["loss"] for record in read_records(tmp_path / "alone")]
    np.testing.assert_allclose(losses, alone, rtol=1e-3)
    assert int(state_of(shared.folder).step) == stopped_at + 2


def test_a_lost_process_ends_the_others(tmp_path):
    write_text(tmp_path)
    config = toy_config(tmp_path, steps=100_000, log_every=1, checkpoint_every=100_000)
    with together(config, 2, "data=2") as (first, second):
        wait_for(first, "step 3/")
        second.kill()
        lost = time.monotonic()
        output = first.communicate(timeout=4 * LOST_AFTER_SECONDS)[0]
    assert time.monotonic() - lost < 3 * LOST_AFTER_SECONDS
    assert first.returncode == 1
    assert "error: a process of this run was lost, or the way to it" in output
    assert "start all of them again" in output
