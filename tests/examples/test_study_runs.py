"""The whole pipeline on a tiny study: missing runs are done, a stop loses nothing, a run that diverges has a row."""

import contextlib
import dataclasses
import json
import os
import signal

import numpy as np
import pytest

from examples.study import cli, runner
from examples.study.data import Files
from examples.study.definition import STUDIES, SWEEP_SEED, Run, Study, queue
from examples.study.report import write_report
from examples.study.rows import bits_of, read_rows
from examples.study.runner import checksum, first_free, run_study
from examples.train.corpus import load_text
from examples.train.errors import Diverged
from examples.train.signals import StopRequest
from examples.train.text import Corpus
from tests.examples.runs import stopped_after, write_text

TOY = STUDIES["toy"]
MODEL = dataclasses.replace(TOY.base.model, context=32)
BASE = dataclasses.replace(TOY.base, steps=6, batch_size=4, log_every=3, eval_every=3, checkpoint_every=3, model=MODEL)
TIMED = ("training", "validation", "busiest_expert", "latent_rms")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    train, validation = write_text(folder, 4000), folder / "validation.txt"
    validation.write_text("the cat sat on a mat and saw that rats ate oats at tea " * 20)
    return Files(train, validation)


@pytest.fixture(scope="module")
def study(text):
    """Two arms with two seeds, and a sweep of one rate."""
    whole, held_out = (load_text(path, "text", "") for path in text)
    kept = len(whole.tokens) - len(whole.tokens) // 20
    corpus = Corpus(whole[:kept], whole[kept:], {"files": held_out})
    return Study("tiny", BASE, (8e-3,), 3, ((("dense", "half"), (1, 2)),), checksum(corpus))


@pytest.fixture(scope="module")
def undisturbed(study, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_study(study, folder, folder / "runs", text)
    return folder


def untimed(rows):
    """The rows without seconds and speed."""
    return {
        run: {
            name: [[step, value] for step, _, value in field] if name in TIMED else field
            for name, field in row.items()
            if name != "tokens_per_second"
        }
        for run, row in rows.items()
    }


def test_every_run_of_the_queue_has_a_row(study, undisturbed):
    rows = read_rows(undisturbed / "rows.jsonl", study)
    assert list(rows) == queue(study, bits_of(rows))
    for run, row in rows.items():
        steps = [3] if run.seed == SWEEP_SEED else [3, 6]
        assert 0 < row["validation_bits_per_byte"] < 9
        assert [step for step, *_ in row["validation"]] == steps
        assert [step for step, *_ in row["training"]] == steps
        assert [len(scales) for *_, scales in row["latent_rms"]] == ([] if run.arm == "dense" else [1 for _ in steps])
        assert not (undisturbed / "runs" / run.name / "checkpoints").exists()
    one, two = (rows[Run("dense", 8e-3, seed)]["validation_bits_per_byte"] for seed in (1, 2))
    assert one != two
    assert {path.name for path in write_report(study, undisturbed)} >= {"tables.md", "curves.png", "latents.png"}


def test_a_queue_that_is_stopped_and_goes_on_gives_the_same_rows(study, text, undisturbed, tmp_path):
    """Stopped within the first run, killed before its row, then stopped within a later one."""
    with stopped_after(2):
        assert not run_study(study, tmp_path, tmp_path / "runs", text)
    assert not read_rows(tmp_path / "rows.jsonl", study)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.rows, "append_row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_study(study, tmp_path, tmp_path / "runs", text)
    with stopped_after(6):
        assert not run_study(study, tmp_path, tmp_path / "runs", text)
    assert len(read_rows(tmp_path / "rows.jsonl", study)) == 2
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"study": "ti')
    assert run_study(study, tmp_path, tmp_path / "runs", text)
    found, expected = (untimed(read_rows(folder / "rows.jsonl", study)) for folder in (tmp_path, undisturbed))
    for run, row in found.items():
        for name, tolerance in (("training", 2e-5), ("busiest_expert", 2e-3)):  # a mean of two means is rounded anew
            np.testing.assert_allclose(row.pop(name), expected[run].pop(name), rtol=0, atol=tolerance)
    assert found == expected


def test_processes_share_the_queue(study, text, undisturbed, tmp_path, monkeypatch):
    """Two hold different runs. A run whose row appears while its lock is awaited is not done again."""
    lines = (undisturbed / "rows.jsonl").read_text().splitlines(keepends=True)
    runs, path = list(read_rows(undisturbed / "rows.jsonl", study)), tmp_path / "rows.jsonl"
    with (
        first_free(runs[:2], tmp_path) as one,
        first_free(runs[:2], tmp_path) as two,
        first_free(runs[:2], tmp_path) as three,
    ):
        assert [one, two, three] == [*runs[:2], None]
    with first_free(runs[:2], tmp_path) as again:
        assert again == runs[0]

    done, sleeps = [], []

    @contextlib.contextmanager
    def by_others(left, scratch):
        """Another process holds all locks at first, and does the first run."""
        if not path.exists():
            path.write_text(lines[0])
            yield None if not sleeps else left[0]
        else:
            yield left[0]

    def run_one(study, run, config, stop):
        done.append(run)
        return json.loads(lines[runs.index(run)])

    monkeypatch.setattr(runner, "first_free", by_others)
    monkeypatch.setattr(runner.time, "sleep", sleeps.append)
    monkeypatch.setattr(runner, "run_one", run_one)
    assert run_study(study, tmp_path, tmp_path / "runs", text)
    assert done == runs[1:]
    assert sleeps == [runner.POLL]


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_run_that_diverges_has_a_row_and_the_queue_goes_on(study, text, tmp_path, monkeypatch):
    def diverge(config, make_probe, stop):
        raise Diverged("The loss is not finite.")

    monkeypatch.setattr(runner, "train_steps", diverge)
    row = runner.run_one(
        study,
        Run("dense", 8e-3, 1),
        dataclasses.replace(BASE, mlp="dense", switch_loss_coef=0.0, run=tmp_path),
        StopRequest(),
    )
    assert row is not None
    assert row["validation_bits_per_byte"] is None
    assert row["training"] == []


def test_a_signal_outside_of_training_stops_the_queue_after_the_row(study, text, undisturbed, tmp_path, monkeypatch):
    lines = (undisturbed / "rows.jsonl").read_text().splitlines()
    ready = iter(json.loads(line) for line in lines)

    def signalled(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return next(ready)

    monkeypatch.setattr(runner, "run_one", signalled)
    assert not run_study(study, tmp_path, tmp_path / "runs", text)
    assert len(read_rows(tmp_path / "rows.jsonl", study)) == 1


def test_only_some_arms(study, text, undisturbed, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(runner, "run_one", lambda study, run, config, stop: done.append(run))
    lines = (undisturbed / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:2]))
    assert not run_study(study, tmp_path, tmp_path / "runs", text, ["half"])
    assert done == [Run("half", 8e-3, 1)]


def test_a_stopped_study_makes_no_report_and_is_no_success(tmp_path, monkeypatch):
    def stopped(*arguments):
        with arguments[-1]:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    monkeypatch.setattr(cli, "run_study", stopped)
    with pytest.raises(SystemExit) as end:
        cli.main(["--folder", str(tmp_path)])
    assert end.value.code == 128 + signal.SIGINT
    assert not any(path.is_file() for path in tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--folder", "--scratch"])
def test_a_file_in_place_of_a_folder_ends_in_one_sentence(option, tmp_path):
    (tmp_path / "notes").touch()
    with pytest.raises(SystemExit, match=rf"^error: {option} .*notes cannot be made .*: name another folder"):
        cli.main(["--folder", str(tmp_path), option, str(tmp_path / "notes")])


def test_a_request_within_itself_lasts():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        with stop:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
