"""Rows and their tables: refusals, intervals calculated by hand, and the same bytes from the same rows."""

import dataclasses
import json
import statistics

import numpy as np
import pytest

from examples.study.arms import Arm
from examples.study.cli import main
from examples.study.curves import whole_intervals
from examples.study.data import Files
from examples.study.definition import STUDIES, Run, config_of, queue, sweep_of
from examples.study.report import write_report
from examples.study.results import Results
from examples.study.rows import append_row, definition_of, read_rows
from examples.study.runner import check_text
from examples.study.statistics import differences, interval, resolved
from examples.study.tables import tables
from examples.train.errors import TrainError
from tests.engineering.sandbox import ROOT
from tests.examples.runs import write_text

STUDY = STUDIES["toy"]


def made_up(run: Run, **changes) -> dict:
    """A row of invented numbers."""
    noise = np.random.default_rng([run.seed, len(run.arm)])
    bits = 2.0 + 0.1 * (run.arm == "dense") + 0.01 * float(noise.normal()) + run.learning_rate
    curve = [[step, 0.5 * step, bits + 1 / step] for step in (8, 16)]
    return {
        "study": STUDY.name,
        **run._asdict(),
        "config": definition_of(STUDY, run),
        "text_sha256": STUDY.text_sha256,
        "validation_bits_per_byte": bits,
        "parameters": 40_000,
        "active_flops_per_token": 200_000,
        "run_flops": 2 * 10**9,
        "training": curve,
        "validation": curve,
        "busiest_expert": [] if run.arm == "dense" else curve,
        "latent_rms": [[step, seconds, [value, 2 * value]] for step, seconds, value in curve] * ("half" in run.arm),
        "tokens_per_second": 50_000.0,
        "device": "made up",
        "versions": {"jax": "0"},
        **changes,
    }


def all_rows() -> list[dict]:
    sweep = {run: made_up(run) for run in sweep_of(STUDY)}
    bits = {run: row["validation_bits_per_byte"] for run, row in sweep.items()}
    return [sweep.get(run) or made_up(run) for run in queue(STUDY, bits)]


def write(folder, rows):
    folder.mkdir(exist_ok=True)
    for row in rows:
        append_row(folder / "rows.jsonl", row)
    return folder


def test_intervals_by_the_printed_table_of_t():
    values = [1.0, 2.0, 4.0]
    found = interval(values)
    assert found.mean == pytest.approx(7 / 3)
    assert found.half == pytest.approx(4.3027 * statistics.stdev(values) / 3**0.5, rel=1e-4)
    assert resolved(0.01, 5) == pytest.approx(2.7764 * 0.01 / 5**0.5, rel=1e-4)
    assert interval([3.0]) == (3.0, None, 1)
    assert not interval([3.0]).excludes_zero
    assert interval([1.0, 1.1, 0.9]).excludes_zero
    assert not interval([-1.0, 1.1, 0.9]).excludes_zero
    assert differences({1: 2.0, 2: 3.0, 4: 9.0}, {2: 1.0, 1: 1.5, 3: 0.0}) == [0.5, 2.0]


def test_equal_rows_give_equal_bytes_in_any_order(tmp_path):
    rows = all_rows()
    one, other = write(tmp_path / "one", rows), write(tmp_path / "other", rows[::-1])
    paths = write_report(STUDY, one)
    assert {path.name for path in write_report(STUDY, other)} == {path.name for path in paths}
    assert len(paths) == 6, "tables and five figures"
    for path in paths:
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name
        assert path.read_bytes()


def test_the_tables_say_what_the_rows_say(tmp_path):
    rows = all_rows()
    write_report(STUDY, write(tmp_path, rows))
    text = (tmp_path / "tables.md").read_text()
    of_arm = {
        arm: [row["validation_bits_per_byte"] for row in rows if row["arm"] == arm and row["seed"]]
        for arm in ("dense", "moe")
    }
    nats = [np.log(2) * (a - b) for a, b in zip(of_arm["dense"], of_arm["moe"], strict=True)]
    half = 12.7062 * statistics.stdev(nats) / 2**0.5
    low, high = np.mean(nats) - half, np.mean(nats) + half
    assert f"| dense - moe | 2 | {np.mean(nats):+.4f} | {low:+.4f} to {high:+.4f} |" in text
    assert "| rows | 16 of 16 |" in text
    assert "| half | half width, no norm | 2 |" in text
    assert f"{STUDY.rates[0]:g} |" in text
    assert "**" in text, "the chosen rates are marked"


def test_a_part_of_the_rows_and_runs_that_diverged(tmp_path):
    rows = all_rows()
    few = write(tmp_path / "few", rows[:2])
    write_report(STUDY, few)
    assert "| rows | 2 of 6 so far, the sweep is not complete |" in (few / "tables.md").read_text()
    lost = [
        row | {"validation_bits_per_byte": None, "validation": []} if row["arm"] == "moe" and row["seed"] else row
        for row in rows
    ]
    written = {path.name for path in write_report(STUDY, write(tmp_path / "lost", lost))}
    assert "0, 2 diverged | diverged" in (tmp_path / "lost" / "tables.md").read_text()
    assert "differences.png" not in written, "there is no plain MoE to compare with"
    with pytest.raises(TrainError, match=r"There is no row in .*: python -m examples\.study --arms toy"):
        write_report(STUDY, tmp_path)


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path):
    rows = all_rows()
    path = write(tmp_path, rows[:2]) / "rows.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(rows[2])[:100])
    assert len(read_rows(path, STUDY)) == 2
    append_row(path, rows[2])
    assert len(read_rows(path, STUDY)) == 3


def test_a_new_option_of_the_trainer_leaves_old_rows_valid(tmp_path):
    """If it has its default. The row lacks it, as rows of an older version do."""
    run = sweep_of(STUDY)[0]
    config = definition_of(STUDY, run)
    del config["spike_factor"]
    assert list(read_rows(write(tmp_path, [made_up(run, config=config)]) / "rows.jsonl", STUDY)) == [run]


FIRST = sweep_of(STUDY)[0]
OTHER = definition_of(STUDY, FIRST) | {"steps": 3}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1 is not a row of a study \(JSONDecodeError: .*restore the line or delete it"),
        ("[1]", r"line 1 is not a row of a study \(TypeError"),
        ({"arm": 3}, r"line 1 is not a row of a study .*wrong type of arm"),
        ({"validation_bits_per_byte": "low"}, r"wrong type of validation_bits_per_byte"),
        ({"study": "d512"}, r"is a row of the study 'd512', not 'toy': give the folder of its rows"),
        (
            {"text_sha256": "0"},
            r"was measured on a text with the SHA-256 0, and the study's text has 2249.*fetch the pinned",
        ),
        ({"arm": "sparse"}, r"has no place in the study toy\. There is no arm 'sparse'"),
        ({"config": OTHER}, r"measured by another definition of dense-lr0\.002-seed0 \(steps=3, now 16\): restore"),
        (
            {"seed": 5, "config": definition_of(STUDY, FIRST._replace(seed=5))},
            r"seed5, which is not in the queue of toy",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, line, message):
    text = line if isinstance(line, str) else json.dumps(made_up(FIRST) | line)
    (tmp_path / "rows.jsonl").write_text(text + "\n")
    with pytest.raises(TrainError, match=message):
        read_rows(tmp_path / "rows.jsonl", STUDY)


def test_a_rate_is_added_to_the_sweep_of_a_study_with_rows(tmp_path):
    """The rows stay until the sweep chooses another rate than theirs, and are refused then."""
    path = write(tmp_path, all_rows()) / "rows.jsonl"
    longer = dataclasses.replace(STUDY, rates=(1e-3, *STUDY.rates))
    assert len(read_rows(path, longer)) == 16
    added = [run for run in sweep_of(longer) if run not in sweep_of(STUDY)]
    for run in added[:-1]:
        append_row(path, made_up(run, validation_bits_per_byte=9.0))
    assert len(read_rows(path, longer)) == 18
    append_row(path, made_up(added[-1], validation_bits_per_byte=0.1))
    with pytest.raises(TrainError, match=r"a row of half-lr0\.002-seed1, which is not in the queue of toy: delete"):
        read_rows(path, longer)


def test_rows_that_come_twice_and_bytes_that_are_no_text(tmp_path):
    path = write(tmp_path, [made_up(FIRST)] * 2) / "rows.jsonl"
    with pytest.raises(TrainError, match=r"line 2 is the second row of dense-lr0\.002-seed0: delete one"):
        read_rows(path, STUDY)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(TrainError, match="does not hold text"):
        read_rows(path, STUDY)
    path.unlink()
    path.mkdir()
    with pytest.raises(TrainError, match=r"rows\.jsonl cannot be read .*: it must be a file"):
        read_rows(path, STUDY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "huge"], "error: There is no study 'huge': use --arms d512, d512-short, d768, d768-short, toy."),
        (["--only", "sparse"], "error: There is no arm 'sparse': use some of dense"),
        (["--only", "accurate-8"], "error: --only accurate-8 is not in the study toy: use some of dense, moe"),
        (["--arms", "d512", "--text", "nowhere"], "error: The text of the study is not in nowhere: python -m"),
        (["--report-only", "--folder", "nowhere"], "error: There is no row in nowhere"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert str(stopped.value.code).startswith(message)


def test_another_text_is_refused(tmp_path):
    text = write_text(tmp_path)
    config = config_of(STUDY, FIRST, Files(text, text), tmp_path / "run")
    with pytest.raises(TrainError, match=r"has the SHA-256 \w+ and must have 2249"):
        check_text(STUDY, config)


def test_a_study_names_known_arms():
    assert all(isinstance(arm, Arm) for study in STUDIES.values() for arm in study.arms)
    assert [arm.name for arm in Results(STUDY, {}).study.arms] == ["dense", "moe", "half", "half-pre", "quantile"]


def test_an_interval_that_a_stop_cut_is_put_together():
    losses, loads = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0], [[[0.25, 0.75]], [[0.5, 0.5]], [[0.75, 0.25]]]
    whole = [{"step": 4, "loss": np.mean(losses[:4])}, {"step": 6, "loss": np.mean(losses[4:])}]
    cut = [{"step": 1, "loss": 1.0}, {"step": 4, "loss": np.mean(losses[1:4])}, whole[1]]
    assert whole_intervals(cut, 4) == whole_intervals(whole, 4) == whole
    cut = [{"step": step, "loss": 0.0, "loads": load} for step, load in zip((1, 4, 6), loads, strict=True)]
    assert whole_intervals(cut, 4)[0]["loads"] == [[0.25 / 4 + 3 * 0.5 / 4, 0.75 / 4 + 3 * 0.5 / 4]]


MEASURED = sorted((ROOT / "benchmarks" / "results" / "study").iterdir())


@pytest.mark.parametrize("folder", MEASURED, ids=lambda folder: folder.name)
def test_the_recorded_rows_give_the_recorded_tables(folder):
    study = STUDIES[folder.name]
    assert tables(Results(study, read_rows(folder / "rows.jsonl", study))) == (folder / "tables.md").read_text()


def test_the_page_states_differences_as_the_recorded_tables_do():
    of_tables = {line for folder in MEASURED for line in (folder / "tables.md").read_text().splitlines()}
    page = (ROOT / "docs" / "study.md").read_text().splitlines()
    stated = [line for line in page if line.startswith("| ") and " - " in line.split("|")[1]]
    assert len(stated) == 12 + 4
    assert set(stated) <= of_tables
