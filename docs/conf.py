"""Settings of Sphinx; `make docs` builds the pages into site/."""

from popriskmin.version import __version__

project = "popriskmin"
author = "The popriskmin developers"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "popriskmin"
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False
# `sphinx-build -b linkcheck docs site/links` asks the network for the links that lead out.
linkcheck_timeout = 20
# Single backquotes in docstrings are code.
default_role = "code"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = False
napoleon_use_ivar = True
