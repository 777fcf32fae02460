"""A study's votes, summed up per prompt dimension and in total."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .markdown import format_markdown
from .statistics import (
    Interval,
    Preference,
    adjust_holm,
    describe_counts,
    equivalence_p_value,
    percentile_interval,
    resample_net,
)
from .store import Vote

SCORES = {"ours": 1, "tie": 0, "baseline": -1}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The votes of one dimension, or all of them ("Total").

    Args:
        net_interval: of `preference.net`, bootstrapped over raters and prompts; None with fewer than 2 of either.
        p_holm: `preference.p_value` adjusted for the number of dimensions; None for the total and without p-value.
    """

    dimension: str
    raters: int
    prompts: int
    preference: Preference
    net_interval: Interval | None
    p_holm: float | None = None


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """Whether the total's net preference lies within the margin that was fixed before the first vote.

    Args:
        margin: in share of votes.
        p_value: of the two one-sided tests.
        interval: of the net preference, at the confidence 1 - 2·alpha that corresponds to them.
        alpha: the tests' level.
    """

    margin: float
    p_value: float
    interval: Interval
    alpha: float

    @property
    def shown(self) -> bool:
        return self.p_value < self.alpha


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """What a study's votes say. `str()` is the report in Markdown.

    Args:
        ours_name, baseline_name: the methods.
        rows: one per dimension by name, then the total.
        margin: the study's, or None.
        equivalence: None without margin, or with fewer than 2 raters or prompts.
        left, right: votes for the video shown as A and as B.
        confidence: of every interval.
    """

    ours_name: str
    baseline_name: str
    rows: tuple[Row, ...]
    margin: float | None
    equivalence: Equivalence | None
    left: int
    right: int
    confidence: float

    @property
    def total(self) -> Row:
        return self.rows[-1]

    def __str__(self) -> str:
        return format_markdown(self)


def summarise_votes(
    votes: Sequence[Vote],
    *,
    ours_name: str,
    baseline_name: str,
    margin: float | None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> StudyReport:
    """The report of at least one vote; see `StudyReportConfig` for the options."""
    subsets = {
        name: [v for v in votes if name in v.dimensions] for name in sorted({d for v in votes for d in v.dimensions})
    }
    rows, resampled = [], None
    for name, subset in [*subsets.items(), ("Total", list(votes))]:
        resampled = _resample(subset, resamples=resamples, seed=seed)
        outcomes = [vote.outcome for vote in subset]
        rows.append(
            Row(
                dimension=name,
                raters=len({vote.rater for vote in subset}),
                prompts=len({vote.prompt for vote in subset}),
                preference=describe_counts(
                    outcomes.count("ours"), outcomes.count("tie"), outcomes.count("baseline"), confidence=confidence
                ),
                net_interval=None if resampled is None else percentile_interval(resampled, confidence=confidence),
            )
        )
    adjusted = adjust_holm([row.preference.p_value for row in rows[:-1]])
    rows[:-1] = [replace(row, p_holm=p) for row, p in zip(rows[:-1], adjusted, strict=True)]
    equivalence = None
    if margin is not None and resampled is not None:
        equivalence = Equivalence(
            margin=margin,
            p_value=equivalence_p_value(resampled, margin),
            interval=percentile_interval(resampled, confidence=2 * confidence - 1),
            alpha=1 - confidence,
        )
    return StudyReport(
        ours_name=ours_name,
        baseline_name=baseline_name,
        rows=tuple(rows),
        margin=margin,
        equivalence=equivalence,
        left=sum(vote.side == "left" for vote in votes),
        right=sum(vote.side == "right" for vote in votes),
        confidence=confidence,
    )


def _resample(votes: Sequence[Vote], *, resamples: int, seed: int) -> NDArray[np.float64] | None:
    """Bootstrapped net preferences of these votes."""
    return resample_net(
        np.array([SCORES[vote.outcome] for vote in votes]),
        np.unique([vote.rater for vote in votes], return_inverse=True)[1],
        np.unique([vote.prompt for vote in votes], return_inverse=True)[1],
        resamples=resamples,
        rng=np.random.default_rng(seed),
    )
