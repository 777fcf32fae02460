"""The prompts of a benchmark: the official list, and the longer texts that a model is given in their place."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from .suite import Suite

LOCATE = "import importlib.util, sys; spec = importlib.util.find_spec(sys.argv[1]); print(spec.origin if spec else '')"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a benchmark.

    Args:
        text: the official text, which names the videos.
        sampled: what the model is given: `text`, or its augmented form.
        dimensions: those that are judged on it.
        index: its place in the list, from 0; seeds follow from it.
    """

    text: str
    sampled: str
    dimensions: tuple[str, ...]
    index: int


def find_info(python: str | Path, suite: Suite) -> Path:
    """The list of prompts inside the official package that the interpreter `python` has. Nothing is imported.

    Raises:
        EvaluationError: the interpreter does not run, or has no such package.
    """
    try:
        found = subprocess.run([str(python), "-c", LOCATE, suite.package], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise EvaluationError(f"{python} does not run as a Python interpreter: {error}") from error
    origin = found.stdout.strip()
    if not origin:
        raise EvaluationError(f"{python} has no package {suite.package!r}; see the set-up commands of {suite.title}")
    path = Path(origin).parent / suite.info_file
    if not path.is_file():
        raise EvaluationError(f"{path} does not exist; give the path of {suite.info_file}")
    return path


def read_info(path: str | Path, suite: Suite) -> list[dict[str, Any]]:
    """Read the official list of prompts, `VBench_full_info.json` or `VBench2_full_info.json`, entry by entry.

    Raises:
        EvaluationError: no such file, another layout, or an entry of another benchmark.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read as {suite.title}'s list of prompts: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise EvaluationError(f"{path} holds no prompts; expected {suite.title}'s {suite.info_file}")
    for number, entry in enumerate(entries):
        text = entry.get("prompt_en") if isinstance(entry, dict) else None
        names = entry.get("dimension") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text.strip() or not isinstance(names, list) or not names:
            raise EvaluationError(f"entry {number} of {path} is {entry!r}; expected text in prompt_en and dimension")
        if unknown := [name for name in names if name not in suite.dimensions]:
            raise EvaluationError(
                f"entry {number} of {path} has the dimension {unknown[0]!r}, which {suite.title} has not; "
                f"give {suite.info_file} of {suite.title}"
            )
        if "/" in text or "\0" in text:
            raise EvaluationError(f"entry {number} of {path}, {text!r}, cannot name a file")
    return entries


def select_entries(
    entries: Sequence[dict[str, Any]], suite: Suite, *, dimensions: Sequence[str] = (), every: int = 1
) -> list[dict[str, Any]]:
    """The entries that `dimensions` (all if empty) are judged on, and of those the first of every `every`.

    The list is ordered by dimension, so that every dimension keeps its share. What is kept keeps its seeds.

    Raises:
        EvaluationError: an unknown dimension, or one that is left without a prompt.
    """
    wanted = {suite.dimension(name) for name in dimensions} or set(suite.dimensions)
    kept = [entry for entry in entries if wanted & set(entry["dimension"])][::every]
    found = {name for entry in kept for name in entry["dimension"]}
    if missing := sorted(wanted - found):
        raise EvaluationError(f"no prompt is left for {', '.join(missing)}; take more than 1 prompt in {every}")
    return [entry | {"dimension": [name for name in entry["dimension"] if name in wanted]} for entry in kept]


def read_prompts(
    entries: Sequence[dict[str, Any]],
    suite: Suite,
    *,
    originals: str | Path | None = None,
    augmented: str | Path | None = None,
) -> list[Prompt]:
    """Pair every official prompt with the text that a model is given.

    `augmented` is a text file with one line per prompt, or a folder of such files, `{dimension}.txt`; `originals` is
    the official list that it was made from, line by line. Without `originals`, the lines follow `entries`.

    A prompt that is there twice counts once, at its last place, as the official sampling overwrites the first video
    by the last. Where a prompt's dimensions have different augmented texts, it is one `Prompt` per text.

    Args:
        entries: from `read_info`, all of them: places, and so seeds, are those in the whole list.

    Raises:
        EvaluationError: lists of different length, a prompt that `originals` lacks, an unreadable file.
    """
    texts = [entry["prompt_en"] for entry in entries]
    places = {text: place for place, text in enumerate(texts)}
    if augmented is None:
        if originals is not None:
            places = {text: place for place, text in enumerate(_lines(originals))}
            _require(texts, places, originals)
        tables = {dimension: dict.fromkeys(texts) for dimension in suite.dimensions}
    elif Path(augmented).is_dir():
        if originals is None or not Path(originals).is_dir():
            raise EvaluationError(f"{augmented} is a folder; give the folder of the original prompts as originals")
        used = sorted({name for entry in entries for name in entry["dimension"]})
        tables = {name: _pair(Path(originals) / f"{name}.txt", Path(augmented) / f"{name}.txt") for name in used}
        for entry in entries:
            for name in entry["dimension"]:
                _require([entry["prompt_en"]], tables[name], Path(originals) / f"{name}.txt")
    else:
        if originals is not None:
            table = _pair(originals, augmented)
            places = {text: place for place, text in enumerate(_lines(originals))}
            _require(texts, table, originals)
        else:
            lines = _lines(augmented)
            if len(lines) != len(texts):
                raise EvaluationError(
                    f"{augmented} has {len(lines)} prompts, {suite.title}'s list {len(texts)}; expected one line per "
                    "prompt. If it was made from another list, give that list as originals"
                )
            table = dict(zip(texts, lines, strict=True))
        tables = {dimension: table for dimension in suite.dimensions}
    grouped: dict[tuple[str, str], dict[str, None]] = {}
    for entry in entries:
        text = entry["prompt_en"]
        for name in entry["dimension"]:
            grouped.setdefault((text, tables[name][text] or text), {})[name] = None
    return [
        Prompt(text=text, sampled=sampled, dimensions=tuple(names), index=places[text])
        for (text, sampled), names in grouped.items()
    ]


def _pair(originals: str | Path, augmented: str | Path) -> dict[str, str]:
    """Augmented text of each original, line by line; of a repeated original, the last."""
    first, second = _lines(originals), _lines(augmented)
    if len(first) != len(second):
        raise EvaluationError(
            f"{originals} has {len(first)} prompts but {augmented} has {len(second)}; expected one line for each"
        )
    return dict(zip(first, second, strict=True))


def _lines(path: str | Path) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read as a list of prompts: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _require(texts: Sequence[str], table: Mapping[str, Any], path: str | Path) -> None:
    if missing := [text for text in texts if text not in table]:
        raise EvaluationError(f"{path} lacks {len(missing)} of the prompts, the first of them {missing[0]!r}")
