"""Writes measurements into the README, two pages of docs and the README's plot: `python -m benchmarks.report`.

`SECTIONS[NAME]` writes a page's text between `<!-- measured: NAME -->` and `<!-- end -->`, from the recorded rows. The
rest of the page is written by hand.
"""

import pathlib
import re
from collections.abc import Callable

from benchmarks import figure, tables
from benchmarks.train_table import train_table
from jax_latent_moe.piped import piped

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs/performance.md", ROOT / "docs/training.md")
FIGURE = ROOT / "docs/figures/performance.svg"
# The GPU whose results the README shows.
DEVICE = "h200"


def of_every_gpu(make: Callable[[tables.Rows, str], str], *suites: str) -> Callable[[tables.Rows], str]:
    """A section with a table for each GPU on which any of the suites was measured, under the GPU's name."""

    def section(rows: tables.Rows) -> str:
        found = tables.devices([row for row in rows if row["suite"] in suites])
        parts = [f"**{_title(device)}**\n\n{make(rows, device)}" for device in found]
        return "\n\n".join(parts) or "Not measured yet."

    return section


def _title(device: str) -> str:
    """The name of a device for readers, such as 2 x H200 of h200-x2."""
    name, _, count = device.upper().partition("-X")
    return f"{count} x {name}" if count else name


def table_of(suite: str, *, memory: bool = False) -> Callable[[tables.Rows], str]:
    """A section with a suite's table for each GPU."""
    return of_every_gpu(lambda rows, device: tables.table(rows, suite, device, memory=memory), suite)


SECTIONS: dict[str, Callable[[tables.Rows], str]] = {
    "kernels": table_of("kernel"),
    "fused": table_of("fused", memory=True),
    "layers": table_of("layer", memory=True),
    "decode": table_of("decode"),
    "step": table_of("step", memory=True),
    "train": of_every_gpu(train_table, "train"),
    "compile": of_every_gpu(tables.compile_table, "compile"),
    "errors": of_every_gpu(tables.errors, *tables.SUITES),
    "runs": of_every_gpu(tables.runs, *tables.SUITES),
    "cpu": tables.cpu_table,
    "super layer": lambda rows: tables.table(
        [row for row in rows if row["shape"] == "super_t8192"], "layer", DEVICE, memory=True
    ),
}


def fill(page: str, rows: tables.Rows) -> str:
    """The page, with its measured sections written from the rows."""
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
    with piped():
        main()
