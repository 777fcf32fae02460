"""What has been done: a row per result, as JSON lines, and where everything else lies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..files import append_jsonl, read_jsonl
from .trial import Maps, Scale, Trial

Row = dict[str, Any]

FILES = {"bank": "banks", "lengths": "lengths", "teacher": "trials", "trial": "trials"}
"""Kind of item → name of the JSONL file of its rows."""


@dataclass(frozen=True)
class Item:
    """A piece of work whose result is one row.

    Args:
        kind: distil a bank and measure its errors; measure them at another length; judge the softmax model; convert,
            fine-tune and judge one trial. "videos" makes what fine-tuning reads, for all seeds, and has no row.
        seed: of the result.
        what: is distilled or tried.
        frames: of the trajectories, for "lengths".
    """

    kind: Literal["videos", "bank", "lengths", "teacher", "trial"]
    seed: int = 0
    what: Maps | Trial | None = None
    frames: int = 0

    def __str__(self) -> str:
        name = self.what.name if isinstance(self.what, Trial) else self.kind
        return name if self.kind == "videos" else f"{name}, seed {self.seed}"


class Records:
    """The rows of one folder at one scale: `banks-SEED.jsonl`, `lengths-SEED.jsonl`, `trials-SEED.jsonl`.

    Args:
        folder: of the results. `clips` holds what figures show; `work`, what only unfinished items need.
        scale: how much of everything.
    """

    def __init__(self, folder: Path, scale: Scale) -> None:
        self.folder, self.scale = folder, scale
        self.work = folder / "work"
        self._rows: dict[tuple[str, int], dict[str, Row]] = {}

    def find(self, item: Item) -> Row | None:
        """The row of `item`, if it is there."""
        return self._read(item).get(self.key(item))

    def append(self, item: Item, result: Row) -> None:
        """Keep the result of `item`, at once."""
        row = {"key": self.key(item), "seed": item.seed, **result}
        append_jsonl(self._file(item), row)
        self._read(item)[row["key"]] = row

    def key(self, item: Item) -> str:
        """Of the item's row."""
        key = self.scale.key(item.what, item.seed)
        return f"{key}-{item.frames}" if item.kind == "lengths" else key

    def bank_folder(self, maps: Maps, seed: int) -> Path:
        """Where a distillation runs and leaves its maps."""
        return self.work / "banks" / self.scale.key(maps, seed)

    def clip(self, what: Trial | None, seed: int, number: int) -> Path:
        """Where the clip of caption `number` of a trial, or of the teacher, is kept."""
        return self.folder / "clips" / f"{self.scale.key(what, seed)}-{number}.mp4"

    def _file(self, item: Item) -> Path:
        return self.folder / f"{FILES[item.kind]}-{item.seed}.jsonl"

    def _read(self, item: Item) -> dict[str, Row]:
        place = (FILES[item.kind], item.seed)
        if place not in self._rows:
            file = self._file(item)
            self._rows[place] = {row["key"]: row for row in read_jsonl(file)} if file.exists() else {}
        return self._rows[place]
