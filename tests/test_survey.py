"""The suite "survey" at sizes of a CPU, with a backend that has tiles there, and its summary."""

import dataclasses
import json
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import survey
from benchmarks.measure import Run, Session
from benchmarks.problems import Grouped
from benchmarks.survey_summary import Compared, summary
from jax_latent_moe.grouped_matmul import Outputs, registry
from tests.test_tune import Blocks, BlocksBackend

TABLE = {"small": Grouped(20, 3, 8, 16, 24), "other": Grouped(7, 1, 4, 8, 40)}


@pytest.fixture
def session(tmp_path):
    return Session(Run("some-gpu", tmp_path), rate=1e12, bandwidth=1e11)


@pytest.fixture
def blocks(monkeypatch):
    """`Blocks` stands in for the compiled kernels, and `auto` takes it."""
    monkeypatch.setitem(registry.BACKENDS, "blocks", (BlocksBackend, Blocks))
    monkeypatch.setitem(registry.AUTO, "cpu", (BlocksBackend(),))
    monkeypatch.setattr(survey, "BACKENDS", {"cutlass": BlocksBackend()})


def rows_of(session) -> list[dict]:
    return [json.loads(line) for line in session.run.path.read_text().splitlines()]


def test_every_tile_is_timed_and_summed_up(session, blocks, capsys):
    survey.measure(session, "survey", TABLE)
    rows, printed = rows_of(session), capsys.readouterr().out
    impls = {"auto", "fastest"}
    assert [(row["shape"], row["pass"]) for row in rows if row["impl"] == "auto"] == [
        (name, pass_) for name in TABLE for pass_ in survey.PASSES
    ]
    assert {row["impl"].split("/")[0] for row in rows} == impls
    listed = [json.loads(line.removeprefix("tiles ")) for line in printed.splitlines() if line.startswith("tiles ")]
    assert [entry["problem"] for entry in listed] == [
        [contraction, shape.rows, shape.num_experts, shape.in_features, shape.out_features]
        for shape in TABLE.values()
        for contraction in survey.PASSES.values()
    ]
    for entry, row in zip(listed, rows[1::2], strict=True):
        assert entry["ms"].keys() == {"blocks/1", "blocks/8"}  # the tile of three rows does not run
        assert row["impl"] == f"fastest/{min(entry['ms'], key=lambda key: entry['ms'][key])}"
    assert printed.count("left out blocks/3: RuntimeError: a block of three rows") == 6
    assert printed.splitlines()[-3].startswith("summary of 6 products:")
    assert printed.splitlines()[-1] == "  fastest backend: blocks 6"


def test_the_floor_counts_each_operand_once(session, blocks):
    survey.measure(session, "survey", {"small": TABLE["small"]})
    x, w, dout = 60 * 16, 8 * 16 * 24, 60 * 24
    floor = 1e3 * 2 * (x + w + dout) / session.bandwidth
    assert [row["floor_ms"] for row in rows_of(session)] == pytest.approx([floor] * 6)


def test_operands_are_those_of_the_shape(session, blocks, monkeypatch):
    """A first tile that computes the wrong product would be timed as well: the operands reach the backend as asked."""
    seen = []
    monkeypatch.setattr(
        Blocks, "run", lambda self, asked, tile, operands: seen.append((asked, operands)) or _zeros(asked)
    )
    survey.measure(session, "survey", {"small": TABLE["small"]})
    shapes = {(asked.contraction, operands.lhs.shape, operands.rhs.shape) for asked, operands in seen}
    x, w, dout = (60, 16), (8, 16, 24), (60, 24)
    assert shapes == {("fwd", x, w), ("dgrad", dout, w), ("wgrad", x, dout)}
    values = survey._values(1000)
    cut = survey._cut(values, (x, w[:2]))
    assert [array.shape for array in cut] == [x, w[:2]]
    assert 0.9 < np.std(np.asarray(values, np.float64)) < 1.1
    assert values.dtype == jnp.bfloat16


def _zeros(asked):
    shape = (asked.num_experts, asked.k, asked.n)
    if asked.contraction != "wgrad":
        shape = (asked.num_rows, asked.n if asked.contraction == "fwd" else asked.k)
    return Outputs(jnp.zeros(shape, jnp.bfloat16))


def test_values_longer_than_those_drawn_repeat(monkeypatch):
    monkeypatch.setattr(survey, "DRAWN", 64)
    values = np.asarray(survey._values(200), np.float32)
    assert len(values) >= 200
    np.testing.assert_array_equal(values[:64], values[64:128])
    assert len(np.unique(values[:64])) > 32


def test_a_backend_may_be_left_out(session, blocks, capsys):
    without = dataclasses.replace(session, without=frozenset({"cutlass", "torch_grouped_mm"}))
    survey.measure(without, "survey", TABLE)
    assert not session.run.path.exists()
    assert "summary" not in capsys.readouterr().out


def test_no_shape_prints_nothing(session, capsys):
    survey.measure(session, "survey", {})
    assert not capsys.readouterr().out


def test_a_sigterm_ends_it_with_the_summary(session, blocks, monkeypatch, capsys):
    time, before = survey.time_in_turn, signal.getsignal(signal.SIGTERM)

    def second_is_stopped(calls, *arguments):
        if len(session.run.path.read_text().splitlines() if session.run.path.exists() else ()) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return time(calls, *arguments)

    monkeypatch.setattr(survey, "time_in_turn", second_is_stopped)
    with pytest.raises(SystemExit, match="143"):
        survey.measure(session, "survey", TABLE)
    assert len(rows_of(session)) == 2
    assert "summary of 1 products:" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_items_are_made_ahead_of_their_use_and_come_in_order(count):
    made = []
    items = (made.append(number) or number for number in range(5))
    for number in survey._ahead(items, count):
        assert made == list(range(min(5, number + count + 1)))
    assert made == list(range(5))


def test_the_summary_of_known_times():
    picked, other = "cutlass/1", "pallas/2"
    products = [
        *(Compared(f"even{number}", picked, {picked: 2.0, other: 2.0}, 4.0) for number in range(9)),
        Compared("slow", picked, {picked: 3.0, other: 2.0}, 2.5),
        Compared("alone", picked, {picked: 1.0}, None),
        Compared("refused", picked, {other: 4.0}, 2.0),
        Compared("nothing", picked, {}, 1.0),
    ]
    assert summary(products) == [
        "summary of 12 products:",
        "  auto / fastest of ours: median 1.000, 90 % 1.000, worst 1.500 (slow: cutlass/1, fastest pallas/2), "
        "above 1 in 1 of 11",
        "  auto / torch_grouped_mm: median 0.500, 90 % 0.500, worst 1.200 (slow), above 1 in 1 of 10",
        "  fastest of ours / torch_grouped_mm: median 0.500, 90 % 0.800, worst 2.000 (refused), above 1 in 1 of 11",
        "  the tile of auto was not timed in 1: refused",
        "  fastest backend: cutlass 10, pallas 2",
    ]
    assert summary(products[-1:]) == summary([]) == []
