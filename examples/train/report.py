"""report.html: one page about a run, which needs neither a network nor another file."""

import dataclasses
import html
import io
from collections.abc import Mapping

from matplotlib import rc_context
from matplotlib.figure import Figure

from examples.train.config import Config

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
figure { margin: 1rem 0; padding: .5rem; background: white; border-radius: .5rem; }
figure svg { display: block; width: 100%; height: auto; }
pre { padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere; background: #8882; border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; }
td { padding: .2rem .8rem .2rem 0; vertical-align: top; overflow-wrap: anywhere; border-bottom: 1px solid #8884; }
"""


def report_page(
    title: str, result: str, facts: Mapping[str, str], figures: Mapping[str, Figure], sample: str, config: Config
) -> str:
    """The page as HTML.

    Args:
        title: the name of the run.
        result: the result in one sentence.
        facts: numbers about the run, by their names.
        figures: the figures, by their headings.
        sample: text that the model wrote.
        config: the options of the run.
    """
    drawn = "".join(f"<h2>{html.escape(name)}</h2><figure>{_svg(figure)}</figure>" for name, figure in figures.items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1><p>{html.escape(result)}</p>
{_table(facts)}
{drawn}
<h2>Sample</h2><pre>{html.escape(sample)}</pre>
<h2>Options</h2><details><summary>All options of the run</summary>{_table(options_of(config))}</details>
</body></html>
"""


def options_of(config: Config) -> dict[str, str]:
    """The options of a run by their names on the command line."""
    flat = {}
    for name, value in dataclasses.asdict(config).items():
        parts = {f"{name}.{part}": inner for part, inner in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {f"--{option.replace('_', '-')}": str(inner) for option, inner in parts.items()}
    return flat


def _table(rows: Mapping[str, str]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows.items()
    )
    return f"<table>{cells}</table>"


def _svg(figure: Figure) -> str:
    """The figure as an SVG element. Ids are salted by its title, because all figures share one page."""
    titles = [axes.get_title() for axes in figure.axes] + [figure.get_suptitle()]
    with rc_context({"svg.hashsalt": "".join(titles), "svg.fonttype": "none", "font.family": "sans-serif"}):
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    text = written.getvalue()
    return text[text.index("<svg") :]  # without the XML header
