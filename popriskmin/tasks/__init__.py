"""Experiments that come with the package, one file each; `popriskmin compare NAME` runs them."""
