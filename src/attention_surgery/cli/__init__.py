"""The command line: `attention-surgery COMMAND --help`."""

from .main import main

__all__ = ["main"]
