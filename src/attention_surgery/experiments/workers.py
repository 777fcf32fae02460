"""Doing items, in this process or shared by several. Only this process writes rows."""

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError

if TYPE_CHECKING:
    from .records import Item, Row
    from .trial import Scale


@dataclass(frozen=True)
class Site:
    """Where and at which scale items are done.

    Args:
        folder, scale: of the results.
        device: a torch device; with "auto" or "cuda" the processes take turns on the GPUs.
        threads: of each process, on the CPU.
    """

    folder: Path
    scale: "Scale"
    device: str
    threads: int


def perform(
    items: "Sequence[Item]",
    site: Site,
    *,
    processes: int,
    needs: "Callable[[Item], set[Item]]",
    keep: "Callable[[Item, Row], None]",
    until: float | None = None,
) -> None:
    """Do `items`, the first that can be done first, and hand every result to `keep`, in this process.

    Args:
        items: in the order of their priority.
        site: where.
        processes: that share the items; 1 does them here.
        needs: item → those that have to be done before it.
        keep: called with each result as soon as it is there.
        until: time of `time.monotonic` after which nothing new is started.

    Raises:
        RunError: a process ended by itself. Anything that an item raises is raised here, once the items that were
            begun are done and kept.
    """
    waiting = list(items)
    busy: dict[Any, Item] = {}  # connection → what the process behind it does

    def next_item() -> "Item | None":
        if until is not None and time.monotonic() > until:
            waiting.clear()
        unfinished = {*waiting, *busy.values()}
        found = next((item for item in waiting if not needs(item) & unfinished), None)
        if found is not None:
            waiting.remove(found)
        return found

    if processes == 1:
        do = _doer(site)
        while (item := next_item()) is not None:
            keep(item, do(item))
        return
    context = get_context("spawn")
    idle: list[Any] = []
    workers = {}
    for number in range(min(processes, len(waiting))):
        here, there = context.Pipe()
        workers[here] = context.Process(target=_work, args=(there, site, number), daemon=True)
        workers[here].start()
        there.close()
        idle.append(here)
    failure: BaseException | None = None
    try:
        while True:
            while idle and failure is None and (item := next_item()) is not None:
                here = idle.pop()
                busy[here] = item
                here.send(item)
            if not busy:
                break
            for here in wait(list(busy)):
                item = busy[here]
                try:
                    result = here.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    result = RunError(f"the process that did {item} ended by itself; was its memory enough?")
                del busy[here]
                if isinstance(result, BaseException):
                    failure = failure or result
                else:
                    keep(item, result)
                    idle.append(here)
    finally:
        for here, worker in workers.items():
            here.close()  # ends it, if it waits for an item
            if here in busy:
                worker.terminate()
            worker.join()
    if failure is not None:
        raise failure


def _work(there: Connection, site: Site, number: int) -> None:
    """Body of a process: items in, results out, until it is ended. It does not outlive its parent."""
    parent = parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _take_gpu(site, number)
    do = _doer(site)
    while True:
        try:
            item = there.recv()
        except EOFError:
            return
        try:
            result: Any = do(item)
        except Exception as error:
            error.add_note(traceback.format_exc())
            result = error
        there.send(result)


def _take_gpu(site: Site, number: int) -> None:
    """The processes take turns on the GPUs."""
    import torch

    if site.device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _doer(site: Site) -> "Callable[[Item], Row]":
    import torch

    from .laboratory import Laboratory

    torch.set_num_threads(site.threads)
    laboratory = Laboratory(site.folder, site.scale, site.device)
    return laboratory.do
