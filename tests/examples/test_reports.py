"""How a run reports its speed: operations, MFU, memory, trackers, a trace; and presets that fit the memory."""

import dataclasses
import importlib
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.train import flops, interval, presets
from examples.train import train as training
from examples.train.data import Ahead, permuted, train_batches
from examples.train.errors import TrainError
from examples.train.metrics import read_records
from examples.train.model import language_model
from examples.train.optimizer import learning_rate, learning_rates
from examples.train.presets import TOY, parts_that_fit
from examples.train.progress import ProgressReport
from examples.train.step import Metrics
from examples.train.text import Text
from examples.train.train import train
from tests.examples.runs import toy_config, write_text


def test_operations_are_counted_by_hand():
    """The toy: d 32, context 32, 2 layers, l 16, 8 experts, k 2, m 32, shared 32."""
    attention = 2 * (4 * 32 * 32) + 2 * 2 * 32 * 32 // 2
    moe = 2 * (32 * 8 + 2 * 32 * 16 + 2 * 2 * 16 * 32 + 2 * 32 * 32)
    head = 2 * 32 * 256
    model = language_model(TOY)
    assert flops.flops_per_token(model) == 3 * (2 * attention + 2 * moe + head)
    dense = flops.flops_per_token(language_model(dataclasses.replace(TOY, mlp="dense")))
    assert dense == flops.flops_per_token(model), "feed-forwards have equal operations"


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA GB200", 2500e12), ("Tesla T4", None)],
)
def test_peak_of_a_gpu_is_its_rows(kind, peak):
    assert flops.peak_flops(SimpleNamespace(platform="gpu", device_kind=kind)) == peak
    assert flops.peak_flops(jax.devices()[0]) is None


METRICS = Metrics(*map(jnp.float32, (1.0, 0.0, 2.0)), None, jnp.asarray(False))


class Gpu(SimpleNamespace):
    """A GPU with the attributes that `Interval` and `preset` read."""

    platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    def memory_stats(self):
        return {"peak_bytes_in_use": 12_300_000_000, "bytes_limit": self.limit}


def test_mfu_and_memory_stand_in_the_records(monkeypatch, capsys):
    model = language_model(TOY)
    monkeypatch.setattr(interval.jax, "local_devices", lambda: [Gpu(limit=1)])
    gathered = interval.Interval(TOY, model, 4, 1.0)
    for _ in range(2):
        gathered.add(METRICS)
    found = gathered.record(2, 0.1)
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * flops.flops_per_token(model) / (4 * 989e12))
    assert found["memory_bytes"] == 12_300_000_000
    record = {"step": 3, "loss": 1.0, "tokens_per_second": 1e6, "seconds_left": 9.0}
    ProgressReport(60).update(record | {"mfu": 0.4123, "memory_bytes": 12.3e9})
    assert capsys.readouterr().out == "step 3/60  loss 1.000  1,000,000 tokens/s  MFU 41.2 %  12.3 GB  9 s left\n"


def test_auto_takes_as_many_parts_as_the_memory_asks_for(monkeypatch):
    monkeypatch.setattr(presets.jax, "default_backend", lambda: "gpu")
    parts = []
    for limit in (80e9, 2e9, 1.2e9, 1e6):
        monkeypatch.setattr(presets.jax, "local_devices", lambda limit=limit: [Gpu(limit=limit)])
        config = presets.preset("auto")
        assert dataclasses.replace(config, accumulate=1) == presets.GPU
        parts.append(config.accumulate)
    assert parts[0] == 1 < parts[1] < parts[2] < parts[3] == presets.GPU.batch_size
    assert all(presets.GPU.batch_size % count == 0 for count in parts)
    assert parts_that_fit(presets.GPU_80GB, 76_000_000_000) == 1


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_presets_are_models_that_fit_together(name):
    config = dataclasses.replace(presets.PRESETS[name], scan_layers=True)  # the same size, traced sooner
    shapes = jax.eval_shape(language_model(config).init, jax.random.key(0), np.zeros((1, 8), np.int32))
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    millions = {"toy": (0, 1), "cpu": (1, 4), "gpu": (20, 100), "gpu-80gb": (1e3, 2e3), "gpu-x8": (4e3, 2e4)}
    low, high = millions[name]
    assert low < size / 1e6 < high


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 1000])
def test_shuffled_positions_are_a_permutation(size):
    order = permuted(np.arange(size), size, 7, 0)
    assert sorted(order) == list(range(size))
    if size > 60:
        assert np.mean(order == np.arange(size)) < 0.2
        assert not np.array_equal(order, permuted(np.arange(size), size, 7, 1))
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.5


def test_batches_ahead_are_those_that_follow():
    batches = train_batches(Text.of(bytes(range(200))), 10, 2, seed=1)
    batches.set_state({"batches": 3})
    ahead = Ahead(batches, lambda batch: batch)
    for number in range(3, 9):
        np.testing.assert_array_equal(next(ahead).tokens, batches.at(number).tokens)
        assert ahead.get_state() == {"batches": number + 1}
    ahead.close()


def test_a_batch_that_cannot_be_placed_ends_the_run():
    def broken(batch):
        raise TrainError("no space")

    with pytest.raises(TrainError, match="no space"):
        next(Ahead(train_batches(Text.of(bytes(200)), 10, 2, seed=1), broken))


def test_learning_rates_are_those_of_the_schedule():
    rates, schedule = learning_rates(TOY.optimizer, 60), learning_rate(TOY.optimizer, 60)
    np.testing.assert_allclose(rates, [schedule(step) for step in range(61)], rtol=1e-6)


class Tracker(SimpleNamespace):
    """The interface that wandb and trackio share."""

    def init(self, **options):
        self.options, self.logged, self.finished = options, [], False

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.finished = True


def test_trackers_get_the_metrics_and_a_profile_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "finish", lambda *_: None)
    write_text(tmp_path)
    packages = {name: Tracker() for name in ("wandb", "trackio")}
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    assert importlib.import_module("wandb") is packages["wandb"]
    config = toy_config(tmp_path, wandb=True, trackio=True, profile="3:4", data_column="text")
    train(config)
    records = read_records(config.folder)
    for package in packages.values():
        assert package.options["project"] == "jax-latent-moe"
        assert package.options["config"]["steps"] == "60"
        assert [step for step, _ in package.logged] == [record["step"] for record in records]
        assert package.logged[0][1]["loss"] == records[0]["loss"]
        assert package.logged[-1][1]["validation_bits_per_byte"] == records[-1]["validation_bits_per_byte"]
        assert package.finished
    assert list((config.folder / "profile").rglob("*.xplane.pb"))
    speeds = [record for record in records if "loss" in record]
    assert all(record["tokens_per_second"] > 0 and record["seconds_left"] >= 0 for record in speeds)
    assert "mfu" not in speeds[0], "a CPU has no row of peaks"
    assert json.loads((config.folder / "config.json").read_text())["profile"] == "3:4"
