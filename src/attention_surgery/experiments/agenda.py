"""What is left to do, in which order, and what waits for what."""

from collections.abc import Iterator, Mapping, Sequence

from .plans import Experiment
from .records import Item, Records
from .trial import Maps, Trial


def agenda(plans: Mapping[str, Experiment], records: Records, seeds: Sequence[int]) -> list[Item]:
    """The items without a result, experiment by experiment, so that a run that is stopped has finished whole ones.

    A bank that has its row is distilled again if its maps are gone and a missing result needs them.
    """
    items = list(dict.fromkeys(item for plan in plans.values() for item in _items(plan, records, seeds)))
    missing = [item for item in items if item.kind != "videos" and records.find(item) is None]
    needed = {need for item in missing for need in needs(item)}
    return [item for item in items if item in missing or (item in needed and not _stands(item, records))]


def needs(item: Item) -> set[Item]:
    """The items whose result on disk `item` starts from."""
    if isinstance(item.what, Trial):
        return {Item("videos"), Item("bank", item.seed, item.what.maps)}
    return {Item("bank", item.seed, item.what)} if item.kind == "lengths" else set()


def _items(plan: Experiment, records: Records, seeds: Sequence[int]) -> Iterator[Item]:
    """Everything that a plan wants; what is waited for comes first."""
    banks = [Item("bank", seed, maps) for maps in plan.banks.values() for seed in seeds]
    yield from banks
    if plan.lengths:
        yield from (Item("lengths", bank.seed, bank.what, frames) for bank in banks for frames in records.scale.lengths)
    if plan.trials:
        yield from (Item("teacher", seed) for seed in seeds)
        yield Item("videos")
        for trial in plan.trials.values():
            yield from (Item("bank", seed, trial.maps) for seed in seeds)
            yield from (Item("trial", seed, trial) for seed in seeds)


def _stands(item: Item, records: Records) -> bool:
    """Whether what other items read of `item` is on disk."""
    if not isinstance(item.what, Maps):
        return False
    return (records.bank_folder(item.what, item.seed) / "bank" / "bank.json").exists()
