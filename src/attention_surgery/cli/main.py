"""Wiring of the command line: one command per verb of the library, each with the library's own settings."""

import logging
import sys

import tyro
from rich.console import Console
from rich.logging import RichHandler

from ..errors import SurgeryError
from . import commands

COMMANDS = {
    "run": commands.run,
    "demo": commands.demo,
    "profile": commands.profile,
    "distill": commands.distill,
    "select": commands.select,
    "convert": commands.convert,
    "finetune": commands.finetune,
    "generate": commands.generate,
    "report": commands.report,
    "evaluate": commands.evaluate,
    "study": commands.study,
    "experiment": commands.experiment,
    "benchmark": commands.benchmark,
}

DESCRIPTION = """Replace the softmax self-attention of a pretrained video diffusion transformer by a faster hybrid.

Start with `attention-surgery demo`, then write a config file and do
`attention-surgery run config.toml --output runs/mine`.
Every command can be stopped and called again; --dry-run says what it will cost.
"""


def main() -> None:
    """Entry point of `attention-surgery`. Errors of the library end it with their message and status 2."""
    console = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="attention-surgery", description=DESCRIPTION)
    except SurgeryError as error:
        console.print(f"[bold red]{type(error).__name__}[/]: {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("stopped; call the same command again to go on")
        sys.exit(130)
