"""The lines that a run prints on a terminal and into a pipe, and times without compilation."""

import dataclasses
import io

import jax.numpy as jnp
import pytest
from rich.console import Console

from examples.train import interval, progress
from examples.train.interval import Interval
from examples.train.model import language_model
from examples.train.presets import TOY
from examples.train.progress import ProgressReport, busy, duration
from examples.train.step import Metrics

RECORD = {"step": 3, "loss": 1.0, "tokens_per_second": 2e6, "seconds_left": 80.0}


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [1000.0]
    monkeypatch.setattr(interval.time, "monotonic", lambda: now[0])
    return now


def test_speed_and_times_leave_compilation_out(clock):
    """A run resumed at step 10 after 50 s: compilation takes 100 s, a step 2 s, a validation 3 s."""
    gathered = Interval(dataclasses.replace(TOY, steps=30), language_model(TOY), 1, 1.0, 50.0)
    metrics = Metrics(*map(jnp.float32, (1.0, 0.0, 2.0)), None, jnp.asarray(False))
    tokens = TOY.batch_size * TOY.model.context

    def steps(count, seconds=2.0):
        for _ in range(count):
            clock[0] += seconds
            gathered.add(metrics)

    def validate(seconds):
        with gathered.paused("validation"):
            clock[0] += seconds

    steps(1, 100.0)
    first = gathered.record(11, 0.1)
    assert first["seconds"] == 50
    assert not {"tokens_per_second", "seconds_left"} & set(first), "the only step compiled"
    steps(4)
    validate(40.0)  # the first one compiles
    steps(2)
    second = gathered.record(17, 0.1)
    assert second["tokens_per_second"] == tokens / 2
    assert second["seconds_left"] == 2 * 13
    assert second["seconds"] == 50 + 2 * 6
    steps(4)
    validate(3.0)
    third = gathered.record(21, 0.1)
    assert third["tokens_per_second"] == tokens / 2
    assert third["seconds_left"] == pytest.approx((2 * 10 + 3) / 10 * 9)
    assert third["seconds"] == 50 + 2 * 10 + 3


def test_a_pipe_gets_plain_lines(capsys):
    with busy("Compiling"):
        pass
    report = ProgressReport(60)
    report.update({"step": 1, "loss": 5.5})
    report.update(RECORD)
    report.close()
    assert capsys.readouterr().out.splitlines() == [
        "Compiling ...",
        "step 1/60  loss 5.500",
        "step 3/60  loss 1.000  2,000,000 tokens/s  1 min 20 s left",
    ]


def test_a_terminal_gets_a_spinner_a_bar_and_lines_that_stay(monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False, _environ={"TERM": "xterm"})
    monkeypatch.setattr(progress, "console", lambda **_: terminal)
    with busy("Compiling"):
        pass
    spun = terminal.file.getvalue()
    assert "Compiling" in spun
    assert "0:00:00" in spun
    report = ProgressReport(60)
    for step in (3, 6):
        report.update(RECORD | {"step": step})
    report.close()
    shown = terminal.file.getvalue()
    assert "6/60" in shown
    for step in (3, 6):  # the bar itself shows no loss
        assert f"step {step}/60  loss 1.000  2,000,000 tokens/s  1 min 20 s left\n" in shown


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_times_are_words(seconds, words):
    assert duration(seconds) == words
