"""The run folder: which settings it was made with, which stages are done, and how long each took."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..files import append_jsonl, read_json, read_jsonl, write_json

FORMAT = 1


@dataclass(frozen=True)
class RunFolder:
    """A folder that `claim` has tied to its settings.

    It holds `config.json` (the settings), `stages.jsonl` (one line per finished stage, with its seconds and what it
    reports), and whatever the stages write.
    """

    path: Path

    def claim(self, settings: dict[str, Any]) -> None:
        """Write `settings` into an empty folder, or check that they are the folder's own.

        Raises:
            RunError: as `is_claimed`.
        """
        claim(self.path, "config.json", settings)

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run `work` unless stage `name` is done; return what it reported, then or now.

        A stage that is killed is run again, and goes on from its own checkpoints.
        """
        if name in self.done():
            return self.done()[name]
        start = time.monotonic()
        result = work()
        row = {"stage": name, "seconds": round(time.monotonic() - start, 2), **result}
        append_jsonl(self.path / "stages.jsonl", row)
        return row

    def done(self) -> dict[str, dict[str, Any]]:
        """The finished stages, by name, in order."""
        file = self.path / "stages.jsonl"
        return {row["stage"]: row for row in read_jsonl(file)} if file.exists() else {}


def claim(folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Write `settings` to the file `name` of an empty folder, or check that they are the folder's own."""
    if not is_claimed(folder, name, settings):
        write_json(folder / name, {"format": FORMAT} | settings)


def is_claimed(folder: Path, name: str, settings: dict[str, Any]) -> bool:
    """Whether `folder` is in use for these settings; it is free otherwise.

    Raises:
        RunError: a folder in use for something else, made by a newer version, with other settings, or damaged.
    """
    file = folder / name
    settings = {"format": FORMAT} | settings
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} is not empty and holds no {name} of a run; give another folder")
        return False
    try:
        before = read_json(file)
    except ValueError as error:
        raise RunError(f"{file} is damaged ({error}); give another folder") from error
    if not isinstance(before, dict) or before.get("format") != FORMAT:
        made = before.get("format") if isinstance(before, dict) else None
        raise RunError(f"{folder} was made by another version (format {made!r}, not {FORMAT})")
    one, two = _flat(before), _flat(settings)
    changed = [
        f"{key}: {one.get(key)!r} → {two.get(key)!r}"
        for key in sorted(one.keys() | two.keys())
        if one.get(key) != two.get(key)
    ]
    if changed:
        raise RunError(f"{folder} was made with other settings ({'; '.join(changed)}); give another folder")
    return True


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
