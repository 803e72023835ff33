"""N steps give the bits of N / 2 steps, SIGKILL and the rest, on virtual devices of one process and on two processes.

For one device see `test_process.py`. The killed run and the resumed one compile separately. A sum whose order differs
between two compilations, or between two collectives, would change bits.
"""

import dataclasses

import pytest

from examples.train import train as training
from examples.train.train import train
from tests.examples.runs import assert_same_bits, options, start, state_of, together, toy_config, wait_for, write_text
from tests.parallel.meshes import WHOLE_MATRIX

STEPS, HALF = 8, 4


def runs(folder, mesh):
    """A run that is not disturbed, and the same run to be killed."""
    write_text(folder)
    killed = toy_config(folder, run=folder / "killed", mesh=mesh, steps=STEPS, log_every=1, checkpoint_every=2)
    killed = dataclasses.replace(killed, sample_bytes=4)
    return dataclasses.replace(killed, run=folder / "whole", checkpoint_every=STEPS), killed


def assert_killed_halfway(folder):
    complete = [int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]
    assert HALF - 2 <= max(complete) < STEPS


@pytest.mark.parametrize("mesh", ["data=2,expert=4", *(["fsdp=2,expert=2,tensor=2"] if WHOLE_MATRIX else [])])
def test_on_eight_virtual_devices(tmp_path, monkeypatch, mesh):
    monkeypatch.setattr(training, "finish", lambda *_: 0.0)
    whole, killed = runs(tmp_path, mesh)
    with start(*options(killed), devices=8, cached=False) as process:
        wait_for(process, f"step {HALF + 1}/")
        process.kill()
    assert_killed_halfway(killed.folder)
    train(killed)
    train(whole)
    assert_same_bits(state_of(killed.folder), state_of(whole.folder))


def test_on_two_processes(tmp_path):
    whole, killed = runs(tmp_path, "expert=2")
    with together(killed, 2, cached=False) as processes:
        wait_for(processes[0], f"step {HALF + 1}/")
    assert_killed_halfway(killed.folder)
    without_end = "from examples.train import train; train.finish = lambda *_: 0.0"
    for config, before in ((killed, without_end), (whole, "")):
        with together(config, 2, before=before) as processes:
            outputs = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
    assert_same_bits(state_of(killed.folder), state_of(whole.folder))
