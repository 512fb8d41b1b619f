"""The tasks of the package, one file each; `popriskmin compare NAME` runs them."""
