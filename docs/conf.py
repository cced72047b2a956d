"""Sphinx: the repository is the source, so that a link means the same file everywhere.

Docstrings are Markdown in the little that they use of it; `_restructured` says so to
autodoc, which reads reStructuredText.
"""

import importlib.metadata
import re

project = "rmtdamp"
author = "the authors of rmtdamp"
release = importlib.metadata.version("rmtdamp")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "docs/generated/*.rst",
    "notebooks/*.ipynb",
    "benchmarks/README.md",
    "benchmarks/paper/README.md",
    "benchmarks/results/*.md",  # tables, linked from a page and in no menu
]
suppress_warnings = ["toc.not_included"]

nb_execution_mode = "off"  # their outputs are committed
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4

default_role = "py:obj"
autosummary_generate = True
templates_path = ["templates"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the Args sections say it in words
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "rmtdamp"
html_extra_path = ["start"]  # index.html, which leads to docs/index.html


def _restructured(app, what, name, obj, options, lines):
    """Indented formulas become literal blocks; bars and stars outside code are text."""
    text = "\n".join(lines)
    text = re.sub(r"(?m)^(\S.*)\n\n(?=    )", r"\1\n\n::\n\n", text)
    parts = re.split(r"(`[^`]*`|(?m:^ +>>> .*$|^ +\.\.\. .*$))", text)
    parts[::2] = [re.sub(r"(?<![\\*])([|*])", r"\\\1", part) for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def setup(app):
    """Before napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", _restructured, priority=400)
