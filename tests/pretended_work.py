"""Items and a stand-in for a laboratory, for processes that only pretend to work."""

import os
import signal
import time

from attention_surgery.errors import RunError
from attention_surgery.experiments.records import Item
from attention_surgery.experiments.trial import Maps, Trial
from attention_surgery.experiments.workers import Site

ONE = Maps(rates=(8,))


def items_of(count: int) -> list[Item]:
    """A bank, trials that wait for it, and others that do not."""
    return [
        Item("bank", 0, ONE),
        *(Item("trial", 0, Trial(maps=ONE, blocks=blocks, rate=8, steps=0)) for blocks in range(1, count)),
        *(Item("teacher", seed) for seed in range(count)),
    ]


def pretend(site: Site):
    """Note when and where an item is done; seed 99 fails, seed 98 ends its process."""

    def do(item: Item) -> dict:
        start = time.monotonic()
        time.sleep(0.2)
        if item.seed == 99:
            raise RunError("as asked")
        if item.seed == 98:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"start": start, "end": time.monotonic(), "process": os.getpid()}

    return do
