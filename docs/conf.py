"""Settings of Sphinx; `make docs` builds the pages into site/."""

from popriskmin.version import __version__

project = "popriskmin"
author = "The popriskmin developers"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "popriskmin"
# Single backquotes in docstrings are code.
default_role = "code"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = False
napoleon_use_ivar = True
