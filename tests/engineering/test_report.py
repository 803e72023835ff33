"""The pages show the measured values."""

import pytest

from benchmarks import figure, report, tables, train_table
from benchmarks.measure import Row, Run


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_a_page_holds_what_the_rows_say(page):
    assert page.read_text() == report.fill(page.read_text(), tables.load()), "run python -m benchmarks.report"


def test_the_plot_shows_what_the_rows_say():
    assert report.FIGURE.read_text() == figure.render(tables.load(), report.DEVICE), "run python -m benchmarks.report"


@pytest.fixture
def rows(tmp_path):
    """Two runs of one problem on a GPU. In the second, one peer is wrong and one is missing."""
    first, second = Run("h200", tmp_path), Run("h200", tmp_path)
    for run, measured in (
        (first, {"pallas": (9.0, None), "lax_ragged_dot": (20.0, 0.001)}),
        (second, {"pallas": (2.0, 0.0017), "xla": (4.0, 0.002), "torch_grouped_mm": (3.0, 0.5), "dense": (1.5, None)}),
    ):
        for impl, (ms, error) in measured.items():
            run.add(Row("kernel", "super_up_t8192", "forward", impl, ms, 1000 / ms, 1.0, error, 2_500_000_000))
    second.add(Row("layer", "super_t8192", "forward", "pallas", 250.4, 1.0, 125.2, 0.004, None))
    return tables.load(tmp_path)


def test_a_line_is_of_the_newest_run_with_ratios_to_our_fastest(rows):
    head, rule, line = tables.table(rows, "kernel", "h200").splitlines()
    assert head == "| problem | pass | pallas | xla | torch `grouped_mm` | one dense matmul | floor |"
    assert set(rule) <= set("|- ")
    assert line == "| `super_up_t8192` | forward | 2.00 | 4.00 | 3.00† (x 1.50) | 1.50 (x 0.75) | 1.00 (50 %) |"


def test_memory_stands_beside_the_time_where_it_was_measured(rows):
    assert "| 2.00, 2.5 GB |" in tables.table(rows, "kernel", "h200", memory=True)
    assert "| 250 |" in tables.table(rows, "layer", "h200", memory=True)


def test_errors_are_the_largest_of_the_newest_runs(rows):
    lines = tables.errors(rows, "h200").splitlines()
    assert "| pallas | 1.7e-03 | 4.0e-03 |" in lines
    assert "| torch `grouped_mm` | 5.0e-01 |  |" in lines
    assert not any("ragged_dot" in line for line in lines)


def test_every_implementation_that_was_recorded_has_a_column():
    loaded = tables.load()
    shown = tables.devices(loaded)
    rows = [row for row in loaded if row["device"] in shown]
    without_table = {
        "train",
        "fp8",
        "fp8_layer",
        "loading",
        "logits",
        "loop",
        "lora",
        "parallel",
        "prefill",
        "ragged_dot",
        "shared",
        "survey",
        "widen",
    }  # the pages of profiles/ have their numbers
    assert {row["impl"] for row in rows if row["suite"] not in without_table} <= tables.LABELS.keys()
    assert {row["impl"].split()[0] for row in rows if row["suite"] == "train"} <= train_table.LABELS.keys()


def test_the_plot_shows_the_families_that_were_measured(rows):
    text = figure.render(rows, "h200")
    assert text == figure.render(rows, "h200")
    assert "pallas" in text
    assert "torch grouped_mm" in text
    assert "tokamax" not in text
    assert figure.render([], "h200").startswith("<?xml")


@pytest.mark.parametrize(("value", "text"), [(0.03456, "0.0346"), (1.0, "1.00"), (12.34, "12.3"), (1755.0, "1755")])
def test_three_digits(value, text):
    assert tables.three_digits(value) == text
