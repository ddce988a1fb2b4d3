"""The command ``maskdistill``: a thin face over the library."""

from maskdistill.cli.commands import main

__all__ = ["main"]
