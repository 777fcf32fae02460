"""What a number of votes does, and does not, show."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Counts of a three-answer comparison and what follows from them alone, as if every vote were independent.

    Args:
        wins, ties, losses: votes for ours, for neither, for the baseline.
        win_share, tie_share, loss_share: of all votes.
        win_interval, tie_interval, loss_interval: Wilson's, of those shares.
        win_rate: wins / (wins + losses); None when every vote is a tie.
        win_rate_interval: Wilson's, of it.
        p_value: of the exact two-sided binomial test of win_rate = 1/2, ties left out; None when every vote is a tie.
    """

    wins: int
    ties: int
    losses: int
    win_share: float
    tie_share: float
    loss_share: float
    win_interval: Interval
    tie_interval: Interval
    loss_interval: Interval
    win_rate: float | None
    win_rate_interval: Interval | None
    p_value: float | None

    @property
    def votes(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def net(self) -> float:
        """Net preference, win_share - loss_share, from -1 to 1."""
        return self.win_share - self.loss_share


def describe_counts(wins: int, ties: int, losses: int, *, confidence: float = 0.95) -> Preference:
    """Shares, Wilson intervals and the exact test of at least one vote."""
    votes, decided = wins + ties + losses, wins + losses
    return Preference(
        wins=wins,
        ties=ties,
        losses=losses,
        win_share=wins / votes,
        tie_share=ties / votes,
        loss_share=losses / votes,
        win_interval=wilson_interval(wins, votes, confidence=confidence),
        tie_interval=wilson_interval(ties, votes, confidence=confidence),
        loss_interval=wilson_interval(losses, votes, confidence=confidence),
        win_rate=wins / decided if decided else None,
        win_rate_interval=wilson_interval(wins, decided, confidence=confidence) if decided else None,
        p_value=float(binomtest(wins, decided).pvalue) if decided else None,
    )


def wilson_interval(count: int, total: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of count / total (JASA 22, 1927), without continuity correction."""
    interval = binomtest(count, total).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def resample_net(
    outcomes: NDArray[np.int64],
    raters: NDArray[np.int64],
    prompts: NDArray[np.int64],
    *,
    resamples: int,
    rng: np.random.Generator,
) -> NDArray[np.float64] | None:
    """Bootstrap the net preference with raters and prompts as clusters (the pigeonhole bootstrap, Owen, AOAS 2007).

    Raters and prompts are drawn with replacement, each on their own; a vote counts as often as its rater was drawn
    times as often as its prompt was. For votes without any clustering it is conservative: up to 3 times the variance.

    Args:
        outcomes: (n,) +1 for ours, 0 for a tie, -1 for the baseline.
        raters, prompts: (n,) the cluster of each vote, numbered from 0.
        resamples: B.

    Returns:
        (B,) net preferences, or None with fewer than 2 raters or 2 prompts, where nothing can be said of others.
        Resamples that hold no vote are drawn again.
    """
    shape = int(raters.max()) + 1, int(prompts.max()) + 1
    if min(len(np.unique(raters)), len(np.unique(prompts))) < 2:
        return None
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (raters, prompts), outcomes)
    np.add.at(counts, (raters, prompts), 1)
    used_raters, used_prompts = counts.any(1), counts.any(0)
    sums, counts = (table[used_raters][:, used_prompts] for table in (sums, counts))
    drawn = np.empty(0)
    while len(drawn) < resamples:
        rater_weights, prompt_weights = (
            rng.multinomial(size, np.full(size, 1 / size), size=resamples) for size in counts.shape
        )
        votes = ((rater_weights @ counts) * prompt_weights).sum(1)
        totals = ((rater_weights @ sums) * prompt_weights).sum(1)
        drawn = np.concatenate([drawn, totals[votes > 0] / votes[votes > 0]])
    return drawn[:resamples]


def percentile_interval(resampled: NDArray[np.float64], *, confidence: float) -> Interval:
    """The bootstrap's percentile interval."""
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def equivalence_p_value(resampled: NDArray[np.float64], margin: float) -> float:
    """p-value of the two one-sided tests (TOST) that the net preference lies within (-margin, margin).

    Each side's is the share of resamples beyond its margin; the larger one counts. So p < alpha where the percentile
    interval of confidence 1 - 2·alpha lies inside the margin.
    """
    beyond = max(int((resampled <= -margin).sum()), int((resampled >= margin).sum()))
    return (beyond + 1) / (len(resampled) + 1)


def adjust_holm(p_values: list[float | None]) -> list[float | None]:
    """Holm's adjustment for testing several dimensions at once; None stays None."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[index] = largest
    return adjusted
