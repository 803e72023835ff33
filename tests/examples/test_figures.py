"""Figures state their result; `compare` and `generate` name missing arguments; the report needs no other file."""

import html.parser
import json
import re

import numpy as np
import pytest

from examples.train import heat_maps, plots, report
from examples.train.compare import compare
from examples.train.errors import TrainError
from examples.train.generate import generate
from examples.train.presets import TOY
from examples.train.routing_map import KINDS, Routing

LOSSES = [
    {"step": 10, "bits_per_byte": 7.0, "tokens_per_second": 100.0, "loads": [[0.5, 0.5, 0.0, 0.0]]},
    {"step": 20, "bits_per_byte": 3.0, "tokens_per_second": 300.0, "loads": [[0.2, 0.3, 0.25, 0.25]]},
]


def validated(*values: float):
    """Records with these validation losses."""
    return [{"step": n, "seconds": n / 2, "validation_bits_per_byte": value} for n, value in enumerate(values, 1)]


@pytest.fixture(scope="module")
def figures():
    """The figures of a small run, drawn by hand."""
    shares = np.zeros((2, len(KINDS), 4))
    shares[:] = 0.5
    shares[1, 2, 3], shares[1, 4, 1] = 0.9, 1.0
    routing = Routing(shares, np.asarray([500, 0, 200, 300, 5, 300, 0]))
    records = [*LOSSES, *validated(4.0, 2.5)]
    records[-1]["validation_bits_per_byte/code"] = 6.5
    return {
        "Loss": plots.loss_figure(records, {"xz": 2.75, "bzip2": 2.5}, 2.25),
        "Load": heat_maps.load_figure(records),
        "Routing": heat_maps.routing_figure(routing),
        "Speed": plots.throughput_figure(records),
    }


def test_titles_state_the_result(figures):
    assert figures["Loss"].axes[0].get_title() == "Validation ends at 2.25 bits per byte, 0.25 below bzip2"
    assert (
        figures["Load"].get_suptitle()
        == "The busiest expert reads 2.0 x an even share at the start and 1.2 x at the end"
    )
    assert figures["Routing"].get_suptitle() == "Expert 3 of layer 2 reads 90 % of the digits", (
        "line ends are rare here"
    )
    assert figures["Speed"].axes[0].get_title() == "The median speed is 200 tokens a second"
    worse = plots.loss_figure(validated(4.0), {"xz": 2.75}, 3.0)
    assert worse.axes[0].get_title() == "Validation ends at 3.00 bits per byte, 0.25 above xz"
    assert plots.throughput([{"step": 1}]) == "No speed: the run had only the step that compiles"
    assert plots.throughput([{"step": 1, "tokens_per_second": 1e3, "mfu": 0.25}]).endswith("at an MFU of 25.0 %")


def test_ends_of_curves_and_compressors_stay_visible(figures):
    """The zoom cuts off the first losses, but no end of a curve and no line."""
    low, high = figures["Loss"].axes[0].get_ylim()
    assert low < 2.25
    assert 6.5 < high < 7


def test_a_map_shows_only_kinds_that_occur(figures):
    panels = [axes for axes in figures["Routing"].axes if axes.get_title().startswith("layer")]
    assert len(panels) == 2
    for axes in panels:
        shown = [label.get_text() for label in axes.get_yticklabels()]
        assert shown == [KINDS[kind] for kind in (0, 2, 3, 4, 5)]
        assert sorted(label.get_text() for label in axes.get_xticklabels()) == list("0123")


class Page(html.parser.HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_needs_no_other_file(figures):
    sample = "<script>alert('&')</script>"
    text = report.report_page("my run", "It ends well.", {"speed": "5"}, figures, sample, TOY)
    page = Page(text)
    assert page.tags.count("svg") == len(figures)
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"url\((?!#)", text)
    shown = " ".join(page.text)
    for words in (sample, "my run", "It ends well.", *figures, "--model.num-experts", "--switch-loss-coef"):
        assert words in shown
    # The figures share one page, so a reference must have one target.
    ids = [value for name, value in page.attributes if name == "id"]
    wanted = {link[1:] for link in links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted
    assert {ids.count(name) for name in wanted} == {1}


def write_run(folder, records):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.json").write_text("{}")
    return folder


def test_runs_of_the_same_name_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one, other = (write_run(tmp_path / name / "run", validated(4.0, end)) for name, end in (("a", 2.5), ("b", 2.25)))
    compare((one, other), tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith(f"{other} is best with 2.250 bits per byte, 0.250 below {one}. Wrote ")
    compare((one,), tmp_path / "one.svg")
    assert capsys.readouterr().out.startswith("run ends at 2.500 bits per byte")
    with pytest.raises(TrainError, match=r"compare\.xyz cannot be written .*: choose another --output"):
        compare((one,), tmp_path / "compare.xyz")


def test_without_a_run_the_runs_are_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        TrainError, match=r"Give the folder of a run: .*generate runs/NAME .*: python -m examples.train"
    ):
        generate()
    write_run(tmp_path / "runs" / "mine", [])
    with pytest.raises(TrainError, match=r"Give the folder of a run: .* Runs here: runs/mine\."):
        generate()
    with pytest.raises(TrainError, match=r"other holds no readable run.* Runs here: runs/mine\."):
        generate(tmp_path / "other")
    with pytest.raises(
        TrainError, match=r"Give the folders of some runs: .*compare runs/A runs/B\. Runs here: runs/mine\."
    ):
        compare()
    with pytest.raises(TrainError, match=r"no validation to compare in .*mine: give folders .* Runs here: runs/mine\."):
        compare((tmp_path / "runs" / "mine",))
