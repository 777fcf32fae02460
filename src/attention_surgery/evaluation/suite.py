"""What a benchmark is: its dimensions, the videos each of them takes, and how its scores are put together."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import EvaluationError

Aggregate = Callable[[Mapping[str, Any]], dict[str, Any]]
"""From the score of every dimension to that of every group, "Total" last; works on numbers and on arrays."""

SLACK = 1e-4
"""How far a score may lie outside its range: a cosine similarity in float32 can be 1.0000002."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model got on a benchmark.

    Args:
        dimensions: score of each dimension, as published tables print it.
        groups: score of each group of dimensions.
        total: the benchmark's single figure.
    """

    dimensions: dict[str, float]
    groups: dict[str, float]
    total: float


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A benchmark that official tools judge.

    Args:
        name: as `evaluate --suite` calls it.
        title: as people call it.
        package, evaluator: the official Python package and its class.
        info_file: the list of prompts inside that package.
        dimensions: every dimension, spelled as the tools spell it.
        samples: videos per prompt.
        more_samples: dimensions that take another number of videos per prompt.
        folder_per_dimension: whether videos lie in one folder per dimension, or all in one.
        name_length: characters of the prompt that a video's name keeps; None keeps all.
        aggregate: groups and total from dimensions in [0, 1]; the total is "Total".
        percent: dimensions whose results per video lie in [0, 100] although their score lies in [0, 1].
        signed: dimensions that may be negative: cosine similarities and regressions, on broken videos.
        selective: dimensions that leave out videos they cannot judge; in others a video without result is an error.
        joint: dimensions with one result per prompt, under the name of its first video.
    """

    name: str
    title: str
    package: str
    evaluator: str
    info_file: str
    dimensions: tuple[str, ...]
    samples: int
    more_samples: Mapping[str, int] = field(default_factory=dict)
    folder_per_dimension: bool
    name_length: int | None
    aggregate: Aggregate
    percent: frozenset[str] = frozenset()
    signed: frozenset[str] = frozenset()
    selective: frozenset[str] = frozenset()
    joint: frozenset[str] = frozenset()

    def dimension(self, name: str) -> str:
        """The tools' spelling of a dimension's name. EvaluationError if the suite has no such dimension.

        Tools write `subject_consistency` and `Multi-View_Consistency`, tables and the official scoring scripts
        `subject consistency` and `Multi-View Consistency`; both are understood, in upper and lower case.
        """
        wanted = name.strip().replace(" ", "_").lower()
        for dimension in self.dimensions:
            if dimension.lower() == wanted:
                return dimension
        raise EvaluationError(
            f"{self.title} has no dimension {name!r}; expected one of {', '.join(sorted(self.dimensions))}"
        )

    def complete(self, values: Mapping[str, float], *, upper: float = 1.0) -> dict[str, float]:
        """The value of every dimension under the tools' spelling, in the suite's order.

        Raises:
            EvaluationError: naming the dimension that is missing, unknown, there twice, or outside [0, `upper`].
        """
        found: dict[str, float] = {}
        for name, value in values.items():
            dimension = self.dimension(name)
            if dimension in found:
                raise EvaluationError(f"{self.title}: {dimension!r} is there twice, in two spellings; keep one")
            found[dimension] = self.check_range(dimension, value, upper=upper)
        if missing := [dimension for dimension in self.dimensions if dimension not in found]:
            raise EvaluationError(
                f"{self.title} needs all {len(self.dimensions)} dimensions; {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing. A missing dimension is not a 0: evaluate it"
            )
        return {dimension: found[dimension] for dimension in self.dimensions}

    def check_range(self, dimension: str, value: Any, *, upper: float = 1.0, where: str = "") -> float:
        """`value` as a number, if it lies in [0, `upper`], or [-`upper`, `upper`] where the dimension is signed.

        Raises:
            EvaluationError: naming the dimension.
        """
        lower = -upper if dimension in self.signed else 0.0
        slack = SLACK * upper
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not lower - slack <= number <= upper + slack:
            hint = "; raw values are fractions, so divide percentages by 100" if upper == 1.0 and number > 1 else ""
            raise EvaluationError(
                f"{where}{self.title}: {dimension!r} is {value!r}; expected a number in [{lower:g}, {upper:g}]{hint}"
            )
        return number

    def samples_of(self, dimension: str) -> int:
        """Videos per prompt that this dimension is judged on."""
        return self.more_samples.get(dimension, self.samples)

    def video_name(self, prompt: str, index: int) -> str:
        """The file name of a prompt's video number `index`: the official prompt, cut if need be, then the number."""
        return f"{prompt[: self.name_length]}-{index}.mp4"
