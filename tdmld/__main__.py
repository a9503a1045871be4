"""`python -m tdmld`: the same as the command `tdmld`."""

import sys

from tdmld.cli import main

if __name__ == "__main__":
    sys.exit(main())
