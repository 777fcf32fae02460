"""Teacher against student on the same prompts and seeds: differences, with intervals over the prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import EvaluationError
from .suite import Aggregate

Values = Mapping[str, Mapping[str, Sequence[float]]]
"""dimension → prompt → value of each of its judged videos, fractions."""

CHUNK = 500  # resamples drawn at once, to bound memory


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two models on one dimension, group or total, in %.

    Args:
        name: of the row.
        kind: what it is.
        teacher, student: the scores.
        difference: student - teacher, in percentage points.
        interval: of the difference, over prompts; None where fewer than two prompts can be compared.
        prompts: prompts with a judged video of both models; None for what is put together from dimensions.
        videos: judged videos of the teacher and of the student; None likewise.
    """

    name: str
    kind: Literal["dimension", "group", "total"]
    teacher: float
    student: float
    difference: float
    interval: tuple[float, float] | None
    prompts: int | None = None
    videos: tuple[int, int] | None = None


def compare(
    teacher: Values,
    student: Values,
    *,
    aggregate: Aggregate | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Difference]:
    """Differences of every dimension, and of every group and the total if `aggregate` is given.

    A dimension's score is the mean over its judged videos. Videos of one prompt, and the two models' videos of one
    prompt, are not independent: the bootstrap draws prompts with replacement, and a drawn prompt brings all its videos
    of both models in all dimensions. Each resample is scored as the benchmark scores, groups and total included; the
    interval is the percentile one of student - teacher. Resamples in which a dimension has no judged video are left
    out of that dimension's interval and of those of its groups.

    Args:
        teacher, student: with the same dimensions, and in each the same prompts.
        aggregate: the benchmark's rule, from dimensions to groups and "Total".
        resamples, confidence, seed: of the bootstrap.

    Returns:
        One row per dimension, then per group, then the total.

    Raises:
        EvaluationError: other dimensions or prompts in one than in the other, or a dimension without any value.
    """
    _check_same(teacher, student)
    dimensions = list(teacher)
    prompts = sorted({prompt for values in teacher.values() for prompt in values})
    sums, counts = _tabulate((teacher, student), dimensions, prompts)
    for m, label in enumerate(("teacher", "student")):
        if empty := [name for name, total in zip(dimensions, counts[m].sum(1), strict=True) if not total]:
            raise EvaluationError(f"no video of the {label} has a value for {empty[0]!r}; there is nothing to compare")
    point = _score(sums.sum(-1), counts.sum(-1), dimensions, aggregate)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[NDArray[np.float64]]] = {name: [] for name in point}
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        weights = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=size).astype(float)
        for name, scores in _score(sums @ weights.T, counts @ weights.T, dimensions, aggregate).items():
            drawn[name].append(scores[1] - scores[0])
    comparable = (counts > 0).all(0).sum(1)
    few = bool((comparable < 2).any())
    rows = []
    for name, (a, b) in point.items():
        d = dimensions.index(name) if name in dimensions else None
        known = not few if d is None else comparable[d] >= 2
        rows.append(
            Difference(
                name=name,
                kind="dimension" if d is not None else "total" if name == "Total" else "group",
                teacher=100 * float(a),
                student=100 * float(b),
                difference=100 * float(b - a),
                interval=_percentiles(np.concatenate(drawn[name]), confidence) if known else None,
                prompts=None if d is None else int(comparable[d]),
                videos=None if d is None else (int(counts[0, d].sum()), int(counts[1, d].sum())),
            )
        )
    return rows


def _check_same(teacher: Values, student: Values) -> None:
    for here, there, label in ((teacher, student, "student"), (student, teacher, "teacher")):
        for name, prompts in here.items():
            if name not in there:
                raise EvaluationError(f"the {label} has no values for {name!r}; evaluate both on the same dimensions")
            if missing := sorted(set(prompts) - set(there[name])):
                raise EvaluationError(
                    f"the {label} lacks {len(missing)} prompts of {name!r}, the first of them {missing[0]!r}; "
                    "evaluate both on the same prompts"
                )


def _tabulate(
    models: Sequence[Values], dimensions: Sequence[str], prompts: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of the values of each model, dimension and prompt: (m, d, p) each."""
    place = {prompt: p for p, prompt in enumerate(prompts)}
    sums, counts = np.zeros((2, len(models), len(dimensions), len(prompts)))
    for m, values in enumerate(models):
        for d, name in enumerate(dimensions):
            for prompt, found in values[name].items():
                sums[m, d, place[prompt]] = sum(found)
                counts[m, d, place[prompt]] = len(found)
    return sums, counts


def _score(
    sums: NDArray[np.float64], counts: NDArray[np.float64], dimensions: Sequence[str], aggregate: Aggregate | None
) -> dict[str, NDArray[np.float64]]:
    """Scores by row name, (m, ...), from sums and counts (m, d, ...); NaN where a dimension has no video."""
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    scores = {name: means[:, d] for d, name in enumerate(dimensions)}
    return scores | (aggregate(scores) if aggregate is not None else {})


def _percentiles(differences: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    low, high = np.nanquantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return 100 * float(low), 100 * float(high)
