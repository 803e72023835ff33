"""Sphinx: Markdown pages, and the API reference from docstrings. `make docs` builds; a warning is an error."""

import re

import jax_latent_moe

project = "jax_latent_moe"
release = jax_latent_moe.__version__
copyright = "the jax_latent_moe authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # jaxtyping's shapes would bury a signature; the docstrings say them
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False

html_theme = "furo"
html_title = f"jax_latent_moe {release}"


def code_in_backticks(app, what, name, obj, options, lines):
    """Docstrings put code in `single` backticks, as Markdown does; to reStructuredText it is ``double``."""
    del app, what, name, obj, options
    lines[:] = [re.sub(r"(?<!`)`([^`]+)`(?!`)(\w?)", r"``\1``\\ \2", line) for line in lines]


def markdown_elsewhere(app, docname, source):
    """Links to Markdown outside of docs/ give the file, as links to code do; MyST would look for a page."""
    del app, docname
    source[0] = re.sub(r"\]\((\.\./[^)#\s]+\.md)(#[^)]*)?\)", r"](<path:\1>)", source[0])


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", code_in_backticks)
    app.connect("source-read", markdown_elsewhere)
