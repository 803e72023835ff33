"""Writes what was measured into the README, docs/performance.md and the README's plot: `python -m benchmarks.report`.

Between `<!-- measured: NAME -->` and `<!-- end -->` of a page stands what `SECTIONS[NAME]` makes of the recorded rows;
the rest of a page is written by hand.
"""

import pathlib
import re
from collections.abc import Callable

from benchmarks import figure, tables

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs/performance.md")
FIGURE = ROOT / "docs/figures/performance.svg"
# The GPU that the README speaks of.
DEVICE = "h200"


def of_every_gpu(make: Callable[[tables.Rows, str], str]) -> Callable[[tables.Rows], str]:
    """The section that holds a table of every GPU, each under its name."""

    def section(rows: tables.Rows) -> str:
        return "\n\n".join(f"**{device.upper()}**\n\n{make(rows, device)}" for device in tables.devices(rows))

    return section


SECTIONS: dict[str, Callable[[tables.Rows], str]] = {
    "kernels": of_every_gpu(lambda rows, device: tables.table(rows, "kernel", device)),
    "layers": of_every_gpu(lambda rows, device: tables.table(rows, "layer", device, memory=True)),
    "decode": of_every_gpu(lambda rows, device: tables.table(rows, "decode", device)),
    "errors": of_every_gpu(tables.errors),
    "runs": of_every_gpu(tables.runs),
    "cpu": tables.cpu_table,
    "super kernels": lambda rows: tables.table(
        [row for row in rows if row["shape"] == "super_up_t8192"], "kernel", DEVICE
    ),
    "super layer": lambda rows: tables.table(
        [row for row in rows if row["shape"] == "super_t8192"], "layer", DEVICE, memory=True
    ),
}


def fill(page: str, rows: tables.Rows) -> str:
    """The page with its measured sections made from the rows."""
    for name in re.findall(r"<!-- measured: (.*?) -->", page):
        start, end = f"<!-- measured: {name} -->\n", "<!-- end -->"
        before, rest = page.split(start)
        page = f"{before}{start}\n{SECTIONS[name](rows)}\n\n{rest[rest.index(end) :]}"
    return page


def main() -> None:
    """Writes the pages and the plot."""
    rows = tables.load()
    for page in PAGES:
        page.write_text(fill(page.read_text(), rows))
    FIGURE.write_text(figure.render(rows, DEVICE))
    print("\n".join(str(path) for path in (*PAGES, FIGURE)))


if __name__ == "__main__":
    main()
