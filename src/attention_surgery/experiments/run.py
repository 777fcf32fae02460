"""`run_experiments`: do what is missing, then write the tables and figures of what is there."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from ..files import read_json, write_json
from ..progress import progress
from .laboratory import Laboratory
from .plans import EXPERIMENTS, Experiment
from .trial import FULL, QUICK, Scale


def run_experiments(
    names: Sequence[str], folder: str | Path, *, quick: bool = False, seeds: Sequence[int] = ()
) -> dict[str, Path]:
    """Run the experiments `names` on tiny-wan in `folder`; stopped at any point, the same call goes on.

    Args:
        names: of `EXPERIMENTS`; all of them if empty.
        folder: of the results: rows as JSON lines, then a table and a figure per experiment.
        quick: a run that only exercises everything, in minutes; its numbers mean nothing.
        seeds: do only these seeds now, so that several processes share the work; tables need all of them.

    Returns:
        name → its Markdown table, of the experiments whose results are complete.

    Raises:
        ConfigError: an experiment or seed that does not exist, or a folder that was made at another scale.
    """
    folder, scale = Path(folder), QUICK if quick else FULL
    plans = select_plans(names, scale)
    for seed in seeds:
        if seed not in scale.seeds:
            raise ConfigError(f"seed {seed} is not one of {scale.seeds}")
    claim(folder, "quick" if quick else "full")
    for seed in seeds or scale.seeds:
        do_seed(plans, Laboratory(folder, scale, seed))
    from .summary import summarise  # matplotlib is only needed now

    return {name: path for name, plan in plans.items() if (path := summarise(name, plan, folder, scale)) is not None}


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


def do_seed(plans: dict[str, Experiment], laboratory: Laboratory) -> None:
    """Errors first, which are cheap, then every trial."""
    banks = list(dict.fromkeys(maps for plan in plans.values() for maps in plan.banks.values()))
    lengths = [
        (maps, frames)
        for plan in plans.values()
        if plan.lengths
        for maps in plan.banks.values()
        for frames in laboratory.scale.lengths
    ]
    trials = list(dict.fromkeys(trial for plan in plans.values() for trial in plan.trials.values()))
    total = len(banks) + len(lengths) + 1 + len(trials)
    with progress(f"seed {laboratory.seed}", total) as advance:
        for maps in banks:
            laboratory.bank(maps)
            advance("distilled")
        for maps, frames in lengths:
            laboratory.errors_at(maps, frames)
            advance(f"errors at {frames} frames")
        laboratory.teacher()
        advance("teacher")
        for trial in trials:
            laboratory.trial(trial)
            advance(trial.name)
