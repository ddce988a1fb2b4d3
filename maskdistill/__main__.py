"""`python -m maskdistill` is the command `maskdistill`."""

from __future__ import annotations

import sys

from maskdistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
