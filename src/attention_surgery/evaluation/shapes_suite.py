"""The small world as a benchmark: captions, clips of a model, and the exact judge."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import shapes
from ..errors import EvaluationError
from ..files import append_jsonl, read_jsonl
from ..generation import write_video
from ..progress import progress
from ..teacher.evaluate import captions_for
from .paired import Difference, Values, compare
from .videos import Sampler, check_seeds

SUMMARIES = {"quality": "Quality", "semantic": "Semantic", "total": "Total"}
"""What the judge gives per clip beside dimensions; a model's is the mean over its clips."""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One clip to make: the caption at place `index`, and which of its clips it is."""

    index: int
    take: int
    caption: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.index:04d}-{self.take}"


def plan_shots(
    n: int,
    *,
    split: Literal["train", "heldout"] = "heldout",
    seeds: Sequence[int] = (0,),
    stride: int = 100_000,
    every: int = 1,
) -> list[Shot]:
    """The suite's `n` fixed captions of combinations seen in training or held out, and the seeds of each.

    Clip j of caption i has the seed `stride`·i + `seeds`[j]. With `every`, only one caption in so many is kept.
    """
    check_seeds(seeds, stride=stride, needed=1)
    return [
        Shot(index=i, take=j, caption=caption, seed=stride * i + seed)
        for i, caption in list(enumerate(captions_for(split, n)))[::every]
        for j, seed in enumerate(seeds)
    ]


def judge_model(
    sample: Callable[[], Sampler],
    shots: Sequence[Shot],
    folder: str | Path,
    *,
    fps: int = shapes.FPS,
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Make this process's share of the clips and judge each from its pixels, before any video codec touches them.

    `folder` then has `scores-*.jsonl`, one row per clip, and `videos`, to look at. Clips that have a row are kept.

    Args:
        sample: makes the sampler; called only if a clip is missing.
        rank, world_size: this process's number, from 0, and how many there are.
    """
    if not 0 <= rank < world_size:
        raise EvaluationError(f"rank {rank} of {world_size} processes does not exist; expected 0 to {world_size - 1}")
    folder = Path(folder)
    done = {row["key"] for row in _rows(folder)}
    share = shots[rank::world_size]
    missing = [shot for shot in share if shot.key not in done]
    if not missing:
        return
    sampler = sample()
    log = folder / f"scores-{rank}-of-{world_size}.jsonl"
    with progress(f"judge {folder}", len(share), done=len(share) - len(missing)) as advance:
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            clips = sampler([shot.caption for shot in part], [shot.seed for shot in part])
            for shot, clip in zip(part, clips, strict=True):
                scores = shapes.judge(clip, shot.caption)
                write_video(folder / "videos" / f"{shot.key}.mp4", clip, fps=fps)
                append_jsonl(log, {"key": shot.key, "seed": shot.seed, "caption": shot.caption, "scores": scores})
                advance(f"total {scores['total']:.2f}")


def read_values(shots: Sequence[Shot], folder: str | Path) -> dict[str, dict[str, list[float]]]:
    """dimension → caption → values of the clips, of a model that was judged in `folder`; summaries included.

    Raises:
        EvaluationError: a clip without a row, a row of another caption or seed, or a value outside [0, 1].
    """
    rows = {row["key"]: row for row in _rows(Path(folder))}
    values: dict[str, dict[str, list[float]]] = {}
    for shot in shots:
        row = rows.get(shot.key)
        if row is None:
            raise EvaluationError(f"{folder} has no scores of clip {shot.key}, {shot.caption!r}; generate it")
        if (row["caption"], row["seed"]) != (shot.caption, shot.seed):
            raise EvaluationError(
                f"{folder} judged clip {shot.key} as {row['caption']!r} with seed {row['seed']}; expected "
                f"{shot.caption!r} with seed {shot.seed}: take another folder"
            )
        for name, value in row["scores"].items():
            if not 0 <= value <= 1:
                raise EvaluationError(
                    f"{folder}: {name!r} of clip {shot.key} is {value!r}; expected a number in [0, 1]"
                )
            values.setdefault(name, {}).setdefault(shot.caption, []).append(value)
    return values


def compare_shapes(teacher: Values, student: Values, **options: Any) -> list[Difference]:
    """`compare` on what `read_values` gives: dimensions, then the judge's summaries as groups and total."""
    rows = {row.name: row for row in compare(teacher, student, **options)}
    summaries = [
        dataclasses.replace(rows.pop(name), name=title, kind="total" if name == "total" else "group")
        for name, title in SUMMARIES.items()
    ]
    return [*rows.values(), *summaries]


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("scores-*.jsonl")):
        yield from read_jsonl(path)
