"""The processes of one run, as `accelerate launch` starts them."""

import os
from datetime import timedelta

from accelerate import PartialState

from .errors import RunError

PATIENCE = timedelta(days=7)
"""For which a process waits for the others. Passes and encodings take hours, not all the same, and accelerate's ten
minutes would end the run; the launcher ends those that wait for a process which died."""


def join_processes(*, cpu: bool) -> PartialState:
    """Which process this is, and of how many. The first call joins them, before anything else of accelerate's does."""
    return PartialState(cpu=cpu, timeout=PATIENCE)


def refuse_several(what: str) -> None:
    """RunError if `what` was launched as several processes, which would write the same files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(f"{what} is one process; of the stages, distill and finetune can be launched as several")
