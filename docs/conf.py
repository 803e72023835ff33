"""Sphinx: Markdown pages, executed tutorials, and the API reference from docstrings.

`make docs` builds; a warning is an error, and so is a tutorial that fails.
"""

import os
import pathlib
import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

import jax_latent_moe

ROOT = pathlib.Path(__file__).parent.parent
# The kernels of the tutorials run on the CPU and can import the examples.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PYTHONPATH"] = str(ROOT)

project = "jax_latent_moe"
release = jax_latent_moe.__version__
copyright = "the jax_latent_moe authors"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False

html_theme = "furo"
html_title = f"jax_latent_moe {release}"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["wide.css"]


def code_in_backticks(app, what, name, obj, options, lines):
    """Docstrings put code in `single` backticks, as Markdown does; to reStructuredText it is ``double``."""
    del app, what, name, obj, options
    lines[:] = [re.sub(r"(?<!`)`([^`]+)`(?!`)(\w?)", r"``\1``\\ \2", line) for line in lines]


def without_aliases(app, what, name, obj, skip, options):
    """Leaves out the fields of named tuples, whose docstrings Python makes. The class's own docstring has them."""
    del app, what, name, options
    return skip or str(getattr(obj, "__doc__", "")).startswith("Alias for field number")


def markdown_elsewhere(app, docname, source):
    """Links to Markdown outside of docs/ give the file, as links to code do; MyST would look for a page."""
    del app, docname
    source[0] = re.sub(r"\]\((\.\./[^)#\s]+\.md)(#[^)]*)?\)", r"](<path:\1>)", source[0])


def changelog(app, docname, source):
    """The changelog's page is the repository's file, with its links seen from docs/."""
    del app
    if docname == "changelog":
        text = re.sub(r"\]\((?![a-z]+:|#)", "](../", (ROOT / "CHANGELOG.md").read_text())
        source[0] = text.replace("](../docs/", "](")


def math(display):
    """A visitor that writes a formula as MathML, which browsers show without a script or a network."""

    def visit(writer, node):
        formula = convert(node.astext(), display=display)
        writer.body.append(f'<div class="math">{formula}</div>' if display == "block" else formula)
        raise SkipNode

    return visit


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", code_in_backticks)
    app.connect("autodoc-skip-member", without_aliases)
    app.connect("source-read", changelog, priority=400)
    app.connect("source-read", markdown_elsewhere)
    app.add_html_math_renderer("mathml", (math("inline"), None), (math("block"), None))
