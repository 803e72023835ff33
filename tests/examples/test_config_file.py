"""`--config FILE`: it reads what a run wrote, flags win, and a wrong file is refused in one sentence."""

import dataclasses
import json
from pathlib import Path

import pytest

from examples.train.cli import parse
from examples.train.config import Config
from examples.train.config_file import to_json
from examples.train.errors import TrainError
from examples.train.presets import TOY, preset


def write(folder, fields) -> list[str]:
    """The command line that reads a file of these options."""
    path = folder / "options.json"
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return ["--config", str(path)]


def test_every_option_comes_back_and_flags_win(tmp_path):
    model = dataclasses.replace(TOY.model, layers=3, dtype="bfloat16")
    changes = {"run": tmp_path / "run", "validation": ("a=b", "c=d"), "documents": True, "seed": 5, "mlp": "moe"}
    config = dataclasses.replace(TOY, model=model, **changes)
    arguments = write(tmp_path, to_json(config))
    assert parse(arguments) == dataclasses.replace(config, config=tmp_path / "options.json")
    flags = ["--steps", "7", "--model.layers", "5", "--no-documents", "--validation", "e=f"]
    other = parse([*flags, *arguments])
    assert (other.steps, other.model.layers, other.documents, other.validation) == (7, 5, False, ("e=f",))
    assert other.model.dtype == "bfloat16"


def test_left_out_options_come_from_the_preset(tmp_path):
    config = parse([*write(tmp_path, {"model": {"layers": 9}}), "--preset", "toy"])
    assert config.model == dataclasses.replace(TOY.model, layers=9)
    assert config.optimizer == TOY.optimizer
    assert parse(write(tmp_path, {"steps": 5})).model == preset("auto").model


def test_a_dense_run_that_kept_another_default_of_balancing_is_read(tmp_path):
    """Nothing reads these options in a dense model. On the command line they are refused."""
    assert parse(write(tmp_path, {"mlp": "dense", "switch_loss_coef": 0.01})).switch_loss_coef == 0
    assert parse(write(tmp_path, {"mlp": "moe", "switch_loss_coef": 0.01})).switch_loss_coef == 0.01
    with pytest.raises(TrainError, match=r"switch_loss_coef=0\.01 has no effect without"):
        parse([*write(tmp_path, {"mlp": "dense"}), "--switch-loss-coef", "0.01"])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("{", r"options\.json cannot be read .*: give a JSON file with --config"),
        ("[1]", r"options\.json holds a list and must hold a JSON object"),
        ({"stepps": 5}, r"has an option that does not exist .*stepps"),
        ({"model": {"width": 5}}, r"has an option that does not exist .*width"),
        ({"model": 5}, r"has the wrong type"),
        ({"steps": "5"}, r"steps='5' must be at least 1"),
        ({"steps": 0}, r"steps=0 must be at least 1"),
        ({"mlp": "sparse"}, r"mlp='sparse' must be one of dense, moe, latent_moe"),
        ({"mlp": ["moe"]}, r"mlp=\['moe'\] must be one of"),
        ({"model": {"dtype": "float16"}}, r"model\.dtype='float16' must be one of float32, bfloat16"),
        ({"documents": 1}, r"documents=1 must be true or false"),
        ({"data": 3}, r"data=3 must be text"),
        ({"run": 3}, r"has the wrong type"),
        ({"validation": 3}, r"has the wrong type"),
        ({"validation": [3]}, r"has the wrong type"),
        ({"preset": "huge"}, r"--preset huge is unknown"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, fields, sentence):
    with pytest.raises(TrainError, match=sentence) as raised:
        parse(write(tmp_path, fields))
    assert "\n" not in str(raised.value)


def test_a_preset_beside_that_of_the_file_is_refused(tmp_path):
    with pytest.raises(TrainError, match=r"--preset gpu has no effect with --config .*: leave one of them out"):
        parse([*write(tmp_path, to_json(TOY)), "--preset", "gpu"])
    with pytest.raises(TrainError, match=r"none\.json cannot be read"):
        parse(["--config", str(tmp_path / "none.json")])


@pytest.mark.parametrize("named", [("a",), ("a=",), ("=b",), ("a b=c",), ("a=b", "a=c")])
def test_validation_texts_have_names_and_paths(named):
    with pytest.raises(TrainError, match="must be NAME=PATH with different names"):
        Config(validation=named)
    assert Config(validation=("a=b=c", "d.e-f=~")).validation_paths == {"a": Path("b=c"), "d.e-f": Path.home()}
