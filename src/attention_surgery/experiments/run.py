"""`run_experiments`: do what is missing, then write the tables and figures of what is there."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from ..files import append_jsonl, read_json, write_json
from ..progress import progress
from .agenda import agenda, needs
from .plans import EXPERIMENTS, Experiment
from .records import Item, Records, Row
from .trial import FULL, QUICK, Scale
from .workers import Site, perform


def run_experiments(
    names: Sequence[str],
    folder: str | Path,
    *,
    quick: bool = False,
    seeds: Sequence[int] = (),
    device: str = "auto",
    processes: int = 1,
    minutes: float | None = None,
) -> dict[str, Path]:
    """Run the experiments `names` on tiny-wan in `folder`; stopped at any point, the same call goes on.

    Args:
        names: of `EXPERIMENTS`; all of them if empty.
        folder: of the results: rows as JSON lines, then a table and a figure per experiment.
        quick: a run that only exercises everything, in minutes; its numbers mean nothing.
        seeds: do only these seeds now; tables need all of them.
        device: a torch device; "auto" takes a GPU if there is one. Not needed when every result is there.
        processes: that share the work, and the GPUs.
        minutes: start nothing new after so long.

    Returns:
        name → its Markdown page, of the experiments whose results are complete.

    Raises:
        ConfigError: an experiment or seed that does not exist, fewer than one process, or a folder that was made at
            another scale.
        RunError: one of several processes ended by itself.
    """
    folder, scale = Path(folder), QUICK if quick else FULL
    plans = select_plans(names, scale)
    for seed in seeds:
        if seed not in scale.seeds:
            raise ConfigError(f"seed {seed} is not one of {scale.seeds}")
    if processes < 1:
        raise ConfigError(f"processes is {processes}; expected at least 1")
    claim(folder, "quick" if quick else "full")
    records = Records(folder, scale)
    do_missing(
        plans,
        records,
        seeds or scale.seeds,
        device=device,
        processes=processes,
        until=None if minutes is None else time.monotonic() + 60 * minutes,
    )
    from .summary import summarise  # matplotlib and SciPy are only needed now

    return {name: path for name, plan in plans.items() if (path := summarise(name, plan, records)) is not None}


def select_plans(names: Sequence[str], scale: Scale) -> dict[str, Experiment]:
    """The plans called `names`, in the order in which they are run. ConfigError for a name that does not exist."""
    for name in names:
        if name not in EXPERIMENTS:
            raise ConfigError(f"experiment {name!r} does not exist; expected one of {tuple(EXPERIMENTS)}")
    return {name: plan(scale) for name, plan in EXPERIMENTS.items() if not names or name in names}


def claim(folder: Path, scale: str) -> None:
    """Tie `folder` to a scale, so that quick rows never stand among full ones."""
    file = folder / "experiments.json"
    if not file.exists():
        write_json(file, {"scale": scale})
    elif (before := read_json(file)["scale"]) != scale:
        raise ConfigError(f"{folder} holds {before} results, not {scale} ones; give another folder")


def do_missing(
    plans: dict[str, Experiment],
    records: Records,
    seeds: Sequence[int],
    *,
    device: str = "auto",
    processes: int = 1,
    until: float | None = None,
) -> None:
    """Do every item that has no result, and log how long the call took in `calls.jsonl`."""
    items = agenda(plans, records, seeds)
    if not items:
        return
    done, start = 0, time.monotonic()
    threads = max(1, (os.cpu_count() or 1) // processes)
    with progress("experiments", len(items)) as advance:

        def keep(item: Item, result: Row) -> None:
            nonlocal done
            if item.kind != "videos":
                records.append(item, result)
            done += 1
            advance(str(item))

        try:
            site = Site(records.folder, records.scale, device, threads)
            perform(items, site, processes=processes, needs=needs, keep=keep, until=until)
        finally:
            spent = round((time.monotonic() - start) / 60, 2)
            row = {"experiments": list(plans), "processes": processes, "minutes": spent, "done": done}
            append_jsonl(records.folder / "calls.jsonl", row | {"left": len(items) - done})
