"""Options of the trainer: every number has a range, checked where the options are built; every option is read."""

import dataclasses
import math
import os
import re
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from examples.train import ranges
from examples.train.cli import parse
from examples.train.config import Config, ModelConfig, OptimizerConfig
from examples.train.errors import TrainError
from examples.train.generate import generate
from examples.train.metrics import MetricsWriter
from examples.train.optimizer import learning_rate, make_optimizer
from examples.train.presets import PRESETS
from examples.train.processes import join
from examples.train.run_folder import WRITTEN, open_folder
from examples.train.text import on_disk
from examples.train.trackers import Trackers
from examples.train.whole_file import write_whole
from jax_latent_moe.errors import ConfigError
from jax_latent_moe.parallel import mesh_sizes

TABLES = {ModelConfig: ranges.MODEL, OptimizerConfig: ranges.OPTIMIZER, Config: ranges.RUN}
NUMBERS = [(cls, field) for cls in TABLES for field in dataclasses.fields(cls) if field.type in (int, float)]
NAMES = [f"{cls.__name__}.{field.name}" for cls, field in NUMBERS]


@pytest.mark.parametrize(("cls", "field"), NUMBERS, ids=NAMES)
def test_every_number_has_a_range(cls, field):
    assert field.name in TABLES[cls], "give it a range in examples/train/ranges.py"
    assert TABLES[cls][field.name].holds(field.default)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, 10**400, 2**1024, 1e39, True, "1", None, 1 + 1j])
@pytest.mark.parametrize(("cls", "field"), NUMBERS, ids=NAMES)
def test_what_is_no_number_in_any_range_is_refused(cls, field, value):
    with pytest.raises(TrainError, match=f"{field.name}=.* must be "):
        cls(**{field.name: value})


def just_outside(field, allowed):
    """The nearest numbers that a range leaves out, in the field's type."""
    if field.type is int:
        return [allowed.low - 1, allowed.high + 1]
    low = allowed.low if allowed.low_open else np.nextafter(np.float32(allowed.low), np.float32(-np.inf))
    high = allowed.high if allowed.high_open else 1.0001 * allowed.high
    return [float(low), float(high)]


@pytest.mark.parametrize(("cls", "field"), NUMBERS, ids=NAMES)
def test_the_ends_of_a_range(cls, field):
    for value in just_outside(field, TABLES[cls][field.name]):
        with pytest.raises(TrainError, match=f"{field.name}=.* must be "):
            cls(**{field.name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], r"seed=-1 must be at least 0 and at most 4294967295"),
        (["--seed", str(2**32)], r"seed=4294967296 must be"),  # JAX would take it for 0
        (["--seed", str(2**63)], r"seed=9223372036854775808 must be"),
        (["--mesh", "data=²"], r"--mesh 'data=²': 'data=²' must be AXIS=SIZE"),
        (["--mesh", "data=2,"], r"--mesh 'data=2,' has an empty part: leave out a comma"),
        (["--mesh", "expert=8,,data=2"], r"--mesh 'expert=8,,data=2' has an empty part: leave out a comma"),
        (["--mesh", ","], r"--mesh ',' has an empty part"),
        (["--mesh", "data=" + "9" * 5000], r"must be AXIS=SIZE"),
        (["--mesh", "data"], r"must be AXIS=SIZE"),
        (["--run", os.fsdecode(b"runs/\xff")], r"--run 'runs/\\udcff' must be UTF-8"),
        (["--data", os.fsdecode(b"\xff.txt")], r"--data '\\udcff.txt' must be UTF-8"),
        (["--run", "a\0b"], r"--run 'a\\x00b' must be UTF-8 without NUL"),
        (["--optimizer.b1", "nan"], r"optimizer\.b1=nan must be at least 0 and below 1"),
        (["--optimizer.b1", "2"], r"optimizer\.b1=2\.0 must be"),
        (["--optimizer.b2", "1"], r"optimizer\.b2=1\.0 must be"),
        (["--optimizer.b2", "0.99999999999"], r"optimizer\.b2=0\.99999999999 must be"),  # 1 in float32
        (["--optimizer.weight-decay", "-5"], r"optimizer\.weight_decay=-5\.0 must be at least 0"),
        (["--optimizer.final-fraction", "-3"], r"optimizer\.final_fraction=-3\.0 must be .* at most 1"),
        (["--optimizer.final-fraction", "1.5"], r"optimizer\.final_fraction=1\.5 must be"),
        (["--optimizer.learning-rate", "inf"], r"optimizer\.learning_rate=inf must be more than 0"),
        (["--optimizer.learning-rate", "1e-60"], r"optimizer\.learning_rate=1e-60 must be"),  # 0 in float32
        (["--optimizer.clip", "nan"], r"optimizer\.clip=nan must be"),
        (["--optimizer.momentum", "0.5"], r"optimizer\.momentum=0\.5 has no effect without --optimizer\.name muon"),
        (["--optimizer.momentum", "0.5", "--optimizer.name", "muon"], None),
        (["--optimizer.momentum", "1", "--optimizer.name", "muon"], r"optimizer\.momentum=1\.0 must be"),
        (["--model.dropout", "nan"], r"model\.dropout=nan must be at least 0 and below 1"),
        (["--model.routed-scaling-factor", "1e39"], r"model\.routed_scaling_factor=1e\+39 must be"),
        (["--model.latent-norm", "post", "--mlp", "moe"], r"model\.latent_norm='post' has no effect without"),
        (["--switch-loss-coef", "0.5", "--mlp", "dense"], r"switch_loss_coef=0\.5 has no effect without"),
        (["--bias-update", "quantile", "--mlp", "dense"], r"bias_update='quantile' has no effect without"),
        (["--switch-loss-coef", "nan"], r"switch_loss_coef=nan must be"),
        (["--spike-factor", "-2"], r"spike_factor=-2\.0 must be"),
        (["--spike-factor", "1"], r"spike_factor=1\.0 must be more than 1"),
        (["--tokenizer", "bpe:²"], r"--tokenizer bpe:² must be bytes, or bpe:N"),
        (["--tokenizer", "bpe:" + "9" * 5000], r"must be bytes, or bpe:N"),
        (["--profile", "1:" + "9" * 5000], r"must be FIRST:LAST"),
        (["--profile", "²:3"], r"--profile ²:3 must be FIRST:LAST"),
        (["--data-column", os.fsdecode(b"\xff")], r"--data-column '\\udcff' must be UTF-8"),
        (["--reduce-dtype", "bfloat16"], r"reduce_dtype='bfloat16' has no effect without --mesh or --coordinator"),
        (
            ["--reduce-dtype", "bfloat16", "--mesh", "data=2"],
            r"--reduce-dtype bfloat16 needs --model\.dtype bfloat16, because gradients computed in float32",
        ),
        (
            ["--reduce-dtype", "bfloat16", "--mesh", "data=2", "--model.dtype", "bfloat16", "--precision", "fp8"],
            r"--reduce-dtype bfloat16 needs --precision dtype, because fp8 encodes the weights from float32",
        ),
        (["--reduce-dtype", "bfloat16", "--mesh", "data=2", "--model.dtype", "bfloat16"], None),
        (["--process", "5"], r"--process 5 needs --coordinator"),
        (["--processes", "2"], r"--processes 2 needs --coordinator"),
        (["--process", "1", "--coordinator", "auto"], r"--process 1 has no effect with --coordinator auto"),
        (
            ["--processes", "2", "--process", "2", "--coordinator", "host:1"],
            r"--process 2 must be at least 0 and below",
        ),
        (["--processes", "-2", "--process", "0", "--coordinator", "host:1"], r"--process 0 must be .* --processes -2"),
        (["--coordinator", "host", "--processes", "2"], r"--coordinator host must be HOST:PORT"),
        (["--coordinator", "host:70000", "--processes", "2"], r"--coordinator host:70000 must be HOST:PORT"),
        (["--coordinator", "host:²", "--processes", "2"], r"--coordinator host:² must be HOST:PORT"),
    ],
)
def test_the_command_line(arguments, message):
    if message is None:
        parse(["--preset", "toy", *arguments])
        return
    with pytest.raises(TrainError, match=message):
        parse(["--preset", "toy", *arguments])


@pytest.mark.parametrize("numbers", [(2, 0), (1, 5), (1, -1)])
def test_joining_checks_the_same(numbers):
    with pytest.raises(TrainError, match="needs --coordinator"):
        join("", *numbers)


def test_the_presets_pass():
    for preset in PRESETS.values():
        for mlp in ("dense", "moe", "latent_moe"):
            dataclasses.replace(preset, mlp=mlp)


@hypothesis.given(st.text("data=fsxpertno,0123456789²٣ -+.", max_size=12))
def test_any_mesh_is_sizes_or_a_sentence(text):
    try:
        sizes = mesh_sizes(text)
    except ConfigError as error:
        assert re.search("(must be|each part is) AXIS=SIZE", str(error))  # noqa: PT017 (it may also be read)
        return
    assert ",".join(f"{axis}={size}" for axis, size in sizes.items()) == text


floats = {
    name: st.floats(np.float32(allowed.low), 1 if allowed.high == 1 else 1e6, width=32).filter(allowed.holds)
    for name, allowed in ranges.OPTIMIZER.items()
    if name != "warmup_steps"
}


@hypothesis.given(st.fixed_dictionaries(floats), st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=10)
def test_what_is_accepted_gives_a_finite_step(drawn, warmup_steps):
    config = OptimizerConfig(name="muon", warmup_steps=warmup_steps, **drawn)
    optimizer = make_optimizer(config, 10)
    params = {"embed": np.ones((2, 3), np.float32)}
    state = optimizer.init(params)
    updates, _ = jax.jit(optimizer.update)(params, state, params)
    assert np.isfinite(updates["embed"]).all()
    assert all(0 <= float(learning_rate(config, 10)(step)) <= 1.0001 * config.learning_rate for step in range(11))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed=-1 must be at least 0 and at most 4294967295"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be"),
        ({"prompt": os.fsdecode(b"\xff")}, "--prompt .* must be UTF-8"),
        ({"length": 0}, "--length 0 must be at least 1"),
        ({"temperature": math.nan}, "--temperature nan more than 0"),
    ],
)
def test_generating_checks_its_options_before_it_reads_a_run(options, message, tmp_path):
    with pytest.raises(TrainError, match=message):
        generate(tmp_path / "no run", **options)


def test_files_that_others_left_in_a_run_folder_stay(tmp_path):
    config = dataclasses.replace(PRESETS["toy"], run=tmp_path)
    left = ["config.json.part", "metrics.jsonl.part", ".config.json.part", "notes.txt"]
    for name in left:
        (tmp_path / name).write_text("mine")
    open_folder(config)
    MetricsWriter(tmp_path, 0, Trackers([], config)).close()
    assert [(tmp_path / name).read_text() for name in left] == ["mine"] * 4
    assert {path.name for path in tmp_path.iterdir()} == {*left, "config.json", "metrics.jsonl", "tensorboard"}
    open_folder(config)  # a second run in it


def test_texts_of_others_beside_a_cached_text_stay(tmp_path):
    for name in (f"text.{os.getpid()}.part", "text.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    before = {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")}
    text = on_disk(tmp_path / "text", np.uint8, lambda: iter([(np.arange(3, dtype=np.uint8), True)]))
    assert text.tokens.tolist() == [0, 1, 2]
    made = {tmp_path / "text", tmp_path / "text" / "tokens", tmp_path / "text" / "starts"}
    assert set(tmp_path.rglob("*")) == {*before, *made}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_folder_with_files_of_others_is_no_run(name, tmp_path):
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(TrainError, match=f"no readable config.json. It holds {name}, which a run would"):
        open_folder(dataclasses.replace(PRESETS["toy"], run=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_whole(path, b"old")

    def fails(self, target):
        raise OSError("full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="full"):
        write_whole(path, b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"config.json": b"old"}


def test_folders_of_other_alphabets_are_taken():
    assert Config(run=Path("läufe/試験"), data="shakespeare").folder == Path("läufe/試験")
