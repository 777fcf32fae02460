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
            RunError: a folder in use for something else, made by a newer version, or with other settings.
        """
        file = self.path / "config.json"
        if not file.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise RunError(f"{self.path} is not empty and holds no run; give another folder")
            write_json(file, {"format": FORMAT} | settings)
            return
        before = read_json(file)
        if before.get("format") != FORMAT:
            raise RunError(f"{self.path} was made by another version (format {before.get('format')!r}, not {FORMAT})")
        one, two = _flat(before), _flat({"format": FORMAT} | settings)
        changed = [
            f"{key}: {one.get(key)!r} → {two.get(key)!r}"
            for key in sorted(one.keys() | two.keys())
            if one.get(key) != two.get(key)
        ]
        if changed:
            raise RunError(f"{self.path} was made with other settings ({'; '.join(changed)}); give another folder")

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


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
