"""The official tools' result files, `{name}_eval_results.json`.

Each is an object `{dimension: [score, [{"video_path": …, "video_results": …}]]}`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from .prompts import Prompt
from .suite import Suite

PATTERN = "*_eval_results.json"


@dataclass(frozen=True, kw_only=True)
class DimensionResult:
    """What the official tool found for one dimension.

    Args:
        dimension: its name.
        score: the tool's own, a fraction.
        videos: file name and value of each judged video, in the unit of `score`; a video that the tool could not judge
            has None. A prompt that is in the official list twice has its videos twice, as in `score`.
        source: the file.
    """

    dimension: str
    score: float
    videos: tuple[tuple[str, float | None], ...]
    source: Path


def read_results(path: str | Path, suite: Suite) -> dict[str, DimensionResult]:
    """Read one result file.

    Raises:
        EvaluationError: no such file, another layout, a dimension of another benchmark or version, or a value outside
            its range; the file, the dimension and the video are named.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read as {suite.title}'s results: {error}") from error
    if not isinstance(document, dict) or not document:
        raise EvaluationError(f"{path} is no result file of {suite.title}; expected {{dimension: [score, videos]}}")
    return {name: _read_dimension(path, suite, name, entry) for name, entry in document.items()}


def collect_results(folder: str | Path, suite: Suite, dimensions: Sequence[str]) -> dict[str, DimensionResult]:
    """Read every result file below `folder`, which together must hold `dimensions`.

    Raises:
        EvaluationError: `read_results`'s, a dimension in two files, or one in none.
    """
    found: dict[str, DimensionResult] = {}
    for path in sorted(Path(folder).rglob(PATTERN)):
        for name, result in read_results(path, suite).items():
            if name in found:
                raise EvaluationError(
                    f"{name!r} is in {found[name].source} and in {path}; keep the file that belongs to these videos"
                )
            found[name] = result
    if missing := [name for name in dimensions if name not in found]:
        raise EvaluationError(
            f"{folder} has no results for {', '.join(missing)} of {suite.title}; evaluate them with the official tool"
        )
    return {name: found[name] for name in dimensions}


def expected_files(suite: Suite, prompts: Sequence[Prompt]) -> dict[str, dict[str, str]]:
    """For every dimension, the file names that its result must cover, each with its prompt."""
    files: dict[str, dict[str, str]] = {}
    for prompt in prompts:
        for name in prompt.dimensions:
            count = 1 if name in suite.joint else suite.samples_of(name)
            for j in range(count):
                files.setdefault(name, {})[suite.video_name(prompt.text, j)] = prompt.text
    return files


def values_by_prompt(result: DimensionResult, suite: Suite, expected: Mapping[str, str]) -> dict[str, list[float]]:
    """The judged values of each prompt's videos, in the order of the file.

    Args:
        expected: file name → prompt, of this dimension.

    Raises:
        EvaluationError: a video without result, unless the dimension may leave it out, or a result for another video;
            it is named.
    """
    values: dict[str, list[float]] = {prompt: [] for prompt in expected.values()}
    where = f"{result.source}: {result.dimension!r}"
    seen = set()
    for name, value in result.videos:
        if name not in expected:
            raise EvaluationError(f"{where} has a result for {name!r}, which is no video of this evaluation")
        seen.add(name)
        if value is not None:
            values[expected[name]].append(value)
        elif result.dimension not in suite.selective:
            raise EvaluationError(f"{where} has no value for {name!r}; evaluate the dimension again")
    if result.dimension not in suite.selective and (missing := [name for name in expected if name not in seen]):
        raise EvaluationError(
            f"{where} lacks {len(missing)} of {len(expected)} videos, the first of them {missing[0]!r}; "
            "the score is not the benchmark's: evaluate the dimension again"
        )
    if not any(values.values()):
        raise EvaluationError(f"{where} has no value for any video; its score says nothing")
    return values


def _read_dimension(path: Path, suite: Suite, name: str, entry: Any) -> DimensionResult:
    where = f"{path}: "
    if name not in suite.dimensions:
        raise EvaluationError(
            f"{where}{suite.title} has no dimension {name!r}: the file is another benchmark's or another version's. "
            f"Expected one of {', '.join(suite.dimensions)}"
        )
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
        raise EvaluationError(
            f"{where}{name!r} is not [score, videos]: the file is of another version of {suite.title}"
        )
    videos = []
    for item in entry[1]:
        if not isinstance(item, dict) or not isinstance(item.get("video_path"), str) or "video_results" not in item:
            raise EvaluationError(f"{where}{name!r} holds {item!r}; expected video_path and video_results")
        file = item["video_path"].replace("\\", "/").rsplit("/", 1)[-1]
        value = item["video_results"]
        if name in suite.selective and value == -1:
            videos.append((file, None))
        else:
            upper = 100.0 if name in suite.percent else 1.0
            checked = suite.check_range(name, value, upper=upper, where=f"{where}{file!r}: ")
            videos.append((file, checked / upper))
    score = suite.check_range(name, entry[0], where=where)
    return DimensionResult(dimension=name, score=score, videos=tuple(videos), source=path)
