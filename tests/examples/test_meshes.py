"""Runs on meshes of virtual devices train as on one device and are resumed on other meshes. Others are refused."""

import dataclasses
import itertools
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from examples.train import train as training
from examples.train.data import train_batches
from examples.train.errors import TrainError
from examples.train.metrics import read_records
from examples.train.mlp import moe_config
from examples.train.model import LanguageModel
from examples.train.optimizer import make_optimizer
from examples.train.placing import make_mesh
from examples.train.processes import join
from examples.train.step import init_state_on, state_shardings
from examples.train.text import Text
from examples.train.train import train
from tests.examples.runs import state_of, stopped_after, toy_config, write_text
from tests.tolerances import relative_error


@pytest.fixture
def without_end(monkeypatch):
    """Leaves out the sample and the figures, which one device makes anyway."""
    monkeypatch.setattr(training, "finish", lambda *_: None)


def losses(config):
    return [record["loss"] for record in read_records(config.folder) if "loss" in record]


@pytest.mark.usefixtures("without_end")
def test_a_run_goes_over_meshes_as_on_one_device(tmp_path):
    """Four steps on four devices against one. Then one device takes the last two steps again, from the middle."""
    write_text(tmp_path)
    alone = toy_config(tmp_path, run=tmp_path / "alone", log_every=2, checkpoint_every=2)
    meshed = dataclasses.replace(alone, run=tmp_path / "meshed", mesh="fsdp=2,expert=2")
    for config in (alone, meshed):
        with stopped_after(4):
            train(config)
    np.testing.assert_allclose(losses(meshed), losses(alone), rtol=1e-4)
    last = losses(meshed)[-1]

    shutil.rmtree(meshed.folder / "checkpoints" / "4")
    with stopped_after(2):
        train(dataclasses.replace(meshed, mesh=""))
    np.testing.assert_allclose(losses(meshed)[-1], last, rtol=1e-4)
    state, wanted = state_of(meshed.folder), state_of(alone.folder)
    assert int(state.step) == 4
    experts, wanted = (s.params["block_01"]["mlp"]["experts"] for s in (state, wanted))
    for name, leaf in wanted.items():
        assert relative_error(experts[name], leaf) < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": "rows=2"}, r"--mesh 'rows=2': 'rows=2' must be AXIS=SIZE"),
        ({"mesh": "data=3,expert=4"}, r"takes 12 devices and there are 8"),
        ({"mesh": "data=8", "batch_size": 12}, r"--batch-size 12 must be a multiple of the 8 devices"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    write_text(tmp_path)
    with pytest.raises(TrainError, match=message):
        train(toy_config(tmp_path, **changes))


def test_several_processes_need_an_address():
    with pytest.raises(TrainError, match=r"--processes 2 needs --coordinator"):
        join("", 2, 0)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_what_one_would_and_nothing_twice(processes):
    text = Text.of(bytes(range(256)) * 40)
    whole = train_batches(text, 10, 8, seed=3)
    parts = [train_batches(text, 10, 8, 3, process=i, processes=processes) for i in range(processes)]
    for batch in itertools.islice(whole, 5):
        own, batch = [next(part).tokens for part in parts], batch.tokens
        assert {len(rows) for rows in own} == {8 // processes}
        assert sorted(map(bytes, np.concatenate(own))) == sorted(map(bytes, batch))
    assert len({str(part.get_state()) for part in parts}) == 1
    # One process goes on where several stopped.
    later = train_batches(text, 10, 8, seed=3)
    later.set_state(parts[0].get_state())
    np.testing.assert_array_equal(next(later).tokens, next(whole).tokens)


@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("muon", 1)])
def test_state_lies_where_the_mesh_splits_it(tmp_path, name, moments):
    config, mesh = toy_config(tmp_path), make_mesh("fsdp=2,expert=4", 8)
    optimizer = make_optimizer(dataclasses.replace(config.optimizer, name=name), config.steps)
    placed = state_shardings(LanguageModel(config.model, moe_config(config)), optimizer, mesh)
    of_expert = [leaf for leaf in jax.tree.leaves(placed.opt_state) if leaf.spec == P("expert", "fsdp", None)]
    assert placed.params["block_01"]["mlp"]["experts"]["w_in"].spec == P("expert", "fsdp", None)
    assert len(of_expert) == moments, "a moment lies with its parameter"
    assert placed.params["head"]["kernel"].spec == P("fsdp", None)
    assert placed.step.is_fully_replicated


def test_a_state_is_drawn_alike_on_any_mesh(tmp_path):
    config = toy_config(tmp_path)
    optimizer, model = make_optimizer(config.optimizer, config.steps), LanguageModel(config.model, moe_config(config))
    state, alone = (init_state_on(model, optimizer, 0, make_mesh(mesh, 8)) for mesh in ("expert=4", ""))
    for leaf, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
        assert relative_error(leaf, other) < 1e-6
