"""`python -m hyperfast` is the command `hyperfast`."""

import sys

from hyperfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
