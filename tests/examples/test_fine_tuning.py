"""Fine-tuning a run with low-rank adapters: what is frozen stays, the rest resumes, and wrong bases are refused."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from examples.train import train as training
from examples.train.adapters import adapt
from examples.train.checkpoint import Checkpoints, Snapshot
from examples.train.cli import parse
from examples.train.config import Config, OptimizerConfig
from examples.train.errors import TrainError
from examples.train.model import language_model
from examples.train.optimizer import make_optimizer
from examples.train.presets import TOY
from examples.train.run_folder import open_folder
from examples.train.step import TrainState, init_state, predict
from examples.train.train import train
from jax_latent_moe.formats import FORMATS
from tests.examples.runs import assert_same_bits, state_of, stopped_after, toy_config, write_text
from tests.tolerances import assert_close

LORA = {"lora": 3, "base_format": "nvfp4"}


def random_state(config) -> TrainState:
    """A first state with random numbers in place of drawn parameters, which takes no compilation."""
    rng = np.random.default_rng(0)
    model, optimizer = language_model(config), make_optimizer(config.optimizer, config.steps)
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    drawn = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype) / 4, (shapes.params, shapes[2]))
    return state._replace(params=drawn[0], correction_bias=drawn[1])


def write_run(config, state):
    checkpoints = Checkpoints(open_folder(config) / "checkpoints")
    checkpoints.save(Snapshot(state, {}, 0.0))
    checkpoints.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, and a base run with a checkpoint of random parameters."""
    folder = tmp_path_factory.mktemp("tuning")
    write_text(folder, 6000)
    config = toy_config(folder, run=folder / "base")
    write_run(config, random_state(config))
    return folder


def test_fine_tuning_trains_adapters_alone_and_resumes_to_the_bit(folder, monkeypatch):
    changes = {"steps": 6, "log_every": 2, "checkpoint_every": 6, "bad_step": "skip", **LORA}
    config = toy_config(folder, base=folder / "base", run=folder / "a", **changes)
    open_folder(config)  # as if it had been killed before its first checkpoint
    bits = train(config)
    tuned, base = state_of(folder / "a"), state_of(folder / "base")
    projections = tuned.params["block_01"]["mlp"]
    assert set(projections) == {"down_proj", "up_proj", "experts"}
    for adapter in jax.tree.leaves(projections, is_leaf=lambda leaf: hasattr(leaf, "scale")):
        assert adapter.base is None
        assert np.any(adapter.b)  # it begins as zero
        assert adapter.a.shape[-1] == 3
    frozen = tuned.frozen["params"]["block_01"]["mlp"]
    assert "experts" not in frozen
    codes = tuned.frozen["codes"]["block_01"]["mlp"]["experts"]
    for name, weight in base.params["block_01"]["mlp"]["experts"].items():
        decoded = np.asarray(codes[name].decode("float32")).reshape(weight.shape)
        assert 0 < np.abs(decoded - weight).max() <= np.abs(weight).max() / 6  # half a step of E2M1 at its largest
    kept = {name: part for name, part in base.params["block_01"]["mlp"].items() if name != "experts"}
    assert_same_bits(frozen | {"experts": {}}, kept | {"experts": {}})
    assert_same_bits(tuned.frozen["params"]["block_00"], base.params["block_00"])

    again = dataclasses.replace(config, run=folder / "b")
    with stopped_after(2):
        assert train(again) is None
    monkeypatch.setattr(training, "finish", lambda *_: bits)  # it has run once
    assert train(again) == bits
    assert_same_bits(state_of(folder / "b"), tuned)
    assert len((folder / "a" / "sample.txt").read_bytes()) > config.sample_bytes  # the model with adapters wrote it


@pytest.mark.parametrize("scanned", [False, True])
def test_a_model_with_adapters_is_that_of_the_merged_weights(folder, scanned, rng):
    """The oracle adds scale * a b to the weights in NumPy, in float64."""
    sizes = dataclasses.replace(toy_config(folder).model, layers=3 if scanned else 2)
    config = toy_config(folder, base=folder, lora=2, lora_alpha=3.0, scan_layers=scanned, model=sizes)
    model, optimizer, base = language_model(config), make_optimizer(config.optimizer, 6), random_state(config)
    state = jax.jit(functools.partial(adapt, model, optimizer, config))(base)
    state = state._replace(params=jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) / 8, state.params))
    state = jax.tree.map(lambda leaf: leaf.astype(np.float32) if leaf.dtype == np.float64 else leaf, state)
    (name,) = state.params
    merged = jax.tree.map(np.asarray, base.params)
    for part, adapters in state.params[name]["mlp"].items():
        for leaf, adapter in adapters.items():
            change = np.asarray(adapter.a, np.float64) @ np.asarray(adapter.b, np.float64) * 3.0 / 2
            merged[name]["mlp"][part][leaf] = (merged[name]["mlp"][part][leaf] + change).astype(np.float32)
    tokens = rng.integers(0, 256, (1, 8))
    logits = jax.jit(functools.partial(predict, model))
    assert_close(logits(state, tokens), logits(base._replace(params=merged), tokens), "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": -1}, r"lora=-1 must be at least 0"),
        ({"lora": 0}, r"--lora 0 and --base .*base belong together: .* at least 1"),
        ({"base": None}, r"--lora 2 and --base None belong together"),
        ({"lora": 0, "base": None, "base_format": "int8"}, r"base_format='int8' has no effect without --lora RANK"),
        ({"lora_alpha": 0.0}, r"lora_alpha=0\.0 must be more than 0"),
        ({"base_format": "int5"}, r"base_format='int5' must be one of dense, .*mxfp4"),
        ({"base_format": "mxfp4"}, r"--base-format mxfp4 does not fit the experts: K=16 .* 32"),
        ({"mlp": "dense"}, r"--lora 2 needs a block with experts: give --mlp moe or latent_moe"),
        ({"model": dataclasses.replace(TOY.model, layers=1)}, r"--lora 2 needs a block .* at least 2"),
        ({"optimizer": OptimizerConfig(name="muon")}, r"--lora 2 needs --optimizer\.name adamw"),
        ({"mesh": "data=2"}, r"--lora 2 trains on one device: leave out --mesh"),
        ({"precision": "fp8"}, r"--lora 2 multiplies in model.dtype: leave out --precision fp8"),
        ({"mlp": "moe"}, r"--base .* was trained with mlp=latent_moe, here moe: give --config .*base/config\.json"),
        ({"tokenizer": "bpe:300"}, r"was trained with tokenizer=bytes, here bpe:300"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused_and_leaves_no_folder(folder, changes, message):
    with pytest.raises(TrainError, match=message):
        train(toy_config(folder, **{"base": folder / "base", "lora": 2, "run": folder / "refused", **changes}))
    assert not (folder / "refused").exists()


def test_a_base_must_be_a_run_with_a_checkpoint_and_without_adapters(folder, tmp_path):
    config = toy_config(folder, base=tmp_path / "nothing", lora=2, run=tmp_path / "run")
    with pytest.raises(TrainError, match=r"nothing holds no readable run"):
        train(config)
    open_folder(toy_config(folder, run=tmp_path / "empty"))
    with pytest.raises(TrainError, match=r"empty has no checkpoint yet"):
        train(dataclasses.replace(config, base=tmp_path / "empty"))
    open_folder(dataclasses.replace(config, run=tmp_path / "tuned"))
    with pytest.raises(TrainError, match=r"tuned has adapters itself: give the run that it was fine-tuned from"):
        train(dataclasses.replace(config, base=tmp_path / "tuned"))
    assert not config.folder.exists()


def test_every_format_is_an_option():
    for name in FORMATS:
        Config(lora=1, base=Path("run"), base_format=name)


def test_options_come_back_from_the_file_of_a_run(folder, tmp_path):
    config = toy_config(folder, base=folder / "base", run=tmp_path / "run", **LORA)
    path = open_folder(config) / "config.json"
    assert parse(["--config", str(path)]) == dataclasses.replace(config, config=path)
