"""Whole runs in this process: they learn, resume to the bit, and stop if numbers are no longer finite."""

import dataclasses
import html
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest

from examples.train.corpus import load_corpus
from examples.train.data import held_out_windows
from examples.train.errors import TrainError
from examples.train.generate import generate, load
from examples.train.metrics import read_records
from examples.train.routing_map import WINDOWS, count_routing
from examples.train.run_folder import WRITTEN
from examples.train.step import variables_of
from examples.train.train import train
from tests.examples.runs import assert_same_bits, state_of, stopped_after, tags_in, toy_config, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """A run of 60 steps without interruption, with checkpoints on its way."""
    (folder / "other.txt").write_text("THE CAT SAT ON A MAT, 123 TIMES.\n" * 20)
    named = (f"capitals={folder / 'other.txt'}",)
    config = toy_config(folder, checkpoint_every=20, run=folder / "finished", validation=named)
    return config, train(config)


def test_learns(finished):
    config, bits = finished
    losses = [record["loss"] for record in read_records(config.folder) if "loss" in record]
    assert losses[-1] < 0.6 * losses[0]
    assert bits < 0.6 * math.log2(256)


def test_learns_in_fp8(finished, folder):
    """The run differs from that in float32 from the first line on, and ends as well."""
    config, bits = finished
    other = dataclasses.replace(config, precision="fp8", run=folder / "fp8", validation=())
    assert train(other) == pytest.approx(bits, rel=0.02)
    losses = ([record["loss"] for record in read_records(each.folder) if "loss" in record] for each in (config, other))
    assert all(one != two for one, two in zip(*losses, strict=True))


def test_writes_what_it_promises(finished, capsys):
    config, bits = finished
    for name in ("loss.png", "expert_load.png", "routing.png", "throughput.png"):
        assert (config.folder / name).read_bytes().startswith(b"\x89PNG")
    sample = (config.folder / "sample.txt").read_text()
    assert len(sample.encode()) >= config.sample_bytes
    page = (config.folder / "report.html").read_text()
    assert html.escape(sample.strip("\n")) in page
    assert page.count("<svg") == 4
    tags = tags_in(config.folder / "tensorboard")
    assert tags >= {"loss", "tokens_per_second", "validation_bits_per_byte", "validation_bits_per_byte/capitals"}
    assert tags >= {"busiest_expert/layer_1", "load_over_even_share/layer_1"}
    assert tags >= {"options/text_summary", "sample/text_summary"}
    assert {path.name for path in config.folder.iterdir()} <= set(WRITTEN), "no file of others is overwritten"
    # A second run finds nothing left to do and says the same.
    assert train(config) == bits
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line for line in lines if re.fullmatch(r"It wrote this at [\d,]+ tokens/s\.", line)]
    last = lines[-1]
    assert re.fullmatch(
        r"Validation: [\d.]+ bits per byte after 60 steps and \d+ s of training; "
        r"the text alone takes xz -9e [\d.]+, bzip2 -9 [\d.]+\. On capitals: [\d.]+\.",
        last,
    )
    assert f"{bits:.3f}" in last


def test_generate_prints_the_text_alone_and_its_speed_to_standard_error(finished, capsys):
    config, _ = finished
    generate(config.folder, prompt="the cat", length=config.sample_bytes)
    printed = capsys.readouterr()
    assert printed.out.startswith("the cat")
    assert len(printed.out.encode()) >= len("the cat") + config.sample_bytes
    assert re.fullmatch(r"Compiling.*\nWritten at [\d,]+ tokens/s\.\n", printed.err)


def test_other_validation_texts_have_their_own_losses(finished):
    config, bits = finished
    records = [record for record in read_records(config.folder) if "validation_bits_per_byte" in record]
    assert [record["step"] for record in records] == [30, 60]
    for record in records:  # the model has never seen a capital letter
        assert record["validation_bits_per_byte/capitals"] > record["validation_bits_per_byte"] + 1
    assert abs(records[-1]["validation_bits_per_byte"] - bits) < 0.1


def test_routing_is_that_of_the_loads(finished):
    """Over all kinds of text, an expert reads the tokens that the layer counts for it."""
    config, _ = finished
    model, state, tokenizer = load(config.folder)
    windows = held_out_windows(config, tokenizer, load_corpus(config.data).validation)
    routing = count_routing(model, state, windows, tokenizer)
    tokens = windows.subset(WINDOWS).inputs.astype(np.int32)
    apply = jax.jit(lambda tokens: model.apply(variables_of(state), tokens, mutable=["losses", "intermediates"]))
    (counted,) = apply(tokens)[1]["intermediates"]["block_01"]["mlp"]["tokens_per_expert"]
    np.testing.assert_allclose(routing.tokens @ routing.shares[0], counted, rtol=1e-6)


def test_a_validation_text_that_is_missing_is_named(folder):
    config = toy_config(folder, run=folder / "none", validation=("code=no/such/file",))
    with pytest.raises(TrainError, match=r"--validation code=no/such/file does not exist: give a text file or folder"):
        train(config)
    assert not config.folder.exists()


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
    with stopped_after(17):  # between two lines of metrics and two checkpoints
        assert train(resumed) is None
    assert int(state_of(resumed.folder).step) == 17
    assert train(resumed) == bits
    assert_same_bits(state_of(resumed.folder), state_of(config.folder))
    steps = [record["step"] for record in read_records(resumed.folder) if "loss" in record]
    assert steps == sorted(set(steps))


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(folder, finished):
    config = dataclasses.replace(finished[0], run=folder / "diverging")
    shutil.copytree(finished[0].folder, config.folder)
    state = state_of(config.folder)
    faster = dataclasses.replace(config.optimizer, learning_rate=1e15)
    again = dataclasses.replace(config, steps=90, log_every=1, optimizer=faster)
    with pytest.raises(TrainError, match=r"no longer finite at step \d+, and the checkpoint of step 60 is kept"):
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
    for path in (copy.folder / "checkpoints" / "60" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(TrainError, match=r"checkpoints/60 is damaged.*--restore previous deletes it"):
        train(copy)


def test_records_cut_off_by_a_kill_are_dropped(folder, finished):
    config, _ = finished
    copy = folder / "cut"
    copy.mkdir()
    lines = (config.folder / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(lines[:-10])
    assert read_records(copy) == [json.loads(line) for line in lines.splitlines()[:-1]]
