"""`python -m popriskmin` is the command `popriskmin`."""

import sys

from popriskmin.cli import main

if __name__ == "__main__":
    sys.exit(main())
