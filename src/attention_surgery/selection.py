"""Choosing a rate per block (§3.3, Eq. 8): a multiple-choice knapsack, solved exactly, and its whole Pareto front.

Errors and costs are floats, which are integers over a common power of two; on these integers sums, comparisons and ties
are exact. (A mixed-integer solver is not: with its tolerances it takes one of two choices whose errors differ by 1e-7
for the other.) Blocks are added one by one to the set of choices that none other beats in both error and cost; on Wan's
30 or 40 blocks, which all cost the same, that set has about a thousand members.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import SelectionError
from .rates import Rate, check_rate, parse_rate

Table = Mapping[int, Mapping[Rate, float]]
"""block → rate → value."""

MAX_POINTS = 1_000_000
"""Most choices held at once; only tables made to defeat the method come near it."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A rate for every block.

    Args:
        rates: block → rate; 1 keeps softmax.
        error: Σ e_ir, the sum over blocks of the error at the chosen rate.
        cost: Σ c_ir as a fraction of the all-softmax cost of the same blocks.
        budget: what `cost` had to stay within, the same fraction; None for a point of the front.
    """

    rates: dict[int, Rate]
    error: float
    cost: float
    budget: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; `from_dict` reads it back to an equal selection."""
        rates = {str(block): rate for block, rate in self.rates.items()}
        return {"rates": rates, "error": self.error, "cost": self.cost, "budget": self.budget}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Selection":
        """Read the JSON object of `to_dict`. SelectionError for a missing or unknown entry."""
        expected = {"rates", "error", "cost", "budget"}
        if set(values) != expected:
            raise SelectionError(f"a selection has the entries {sorted(expected)}; got {sorted(values)}")
        rates = {int(block): parse_rate(str(rate)) for block, rate in values["rates"].items()}
        return cls(rates=rates, error=values["error"], cost=values["cost"], budget=values["budget"])


def select_rates(errors: Table, costs: Table, *, budget: float) -> Selection:
    """The rates of least summed error whose summed cost is within `budget` (Eq. 8), exactly.

    Of choices with the same error the cheapest is taken, of those with the same cost too the one with the lower rate in
    the first block where they differ ("linear" counts as the highest).

    Args:
        errors: block → rate → e_ir, as `distill` returns it; softmax, rate 1, has error 0 and need not be named. An
            empty row leaves its block to softmax.
        costs: block → rate → c_ir, as `block_costs` returns it, with rate 1 and every rate of `errors` for the same
            blocks; in any unit. Rates that `errors` does not have at all are no candidates.
        budget: fraction of the all-softmax cost Σ c_i1, above 0. From 1 on, nothing needs converting.

    Raises:
        SelectionError: a budget below every choice (the message names the smallest that can be met), a missing entry
            (it names block and rate), or a value that is negative, infinite or not a number.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0:
        raise SelectionError(f"budget is {budget!r}; expected a fraction of the all-softmax cost, above 0")
    front = pareto_front(errors, costs)
    within = [point for point in front if point.cost <= budget]
    if not within:
        raise SelectionError(
            f"budget {budget} cannot be met: the cheapest choice costs {_rounded_up(front[0].cost)} of all softmax; "
            "give at least that, or add cheaper rates"
        )
    best = within[-1]
    return Selection(rates=best.rates, error=best.error, cost=best.cost, budget=float(budget))


def pareto_front(errors: Table, costs: Table) -> list[Selection]:
    """Every choice that no other beats: none has less error at its cost or less, none less cost at its error or less.

    Sorted by rising cost and falling error. Of choices that are equal in both, one is listed (see `select_rates`).

    Args:
        errors, costs: as for `select_rates`.

    Raises:
        SelectionError: as `select_rates`, or more than a million points.
    """
    rates = check_tables(errors, costs)
    error_of, error_unit = _to_integers(errors[block].get(rate, 0.0) for block in rates for rate in rates[block])
    cost_of, _ = _to_integers(costs[block][rate] for block in rates for rate in rates[block])
    dense = sum(cost_of[float(costs[block][1])] for block in rates)

    points: list[tuple[int, int, Any]] = [(0, 0, None)]  # cost, error, path of indices into the blocks' rates
    for block, candidates in rates.items():
        steps = [(cost_of[float(costs[block][r])], error_of[float(errors[block].get(r, 0.0))]) for r in candidates]
        longer = [
            (cost + more_cost, error + more_error, (path, index))
            for index, (more_cost, more_error) in enumerate(steps)
            for cost, error, path in points
        ]
        points = _undominated(longer)
        if len(points) > MAX_POINTS:
            raise SelectionError(
                f"more than {MAX_POINTS} choices stand beside each other at block {block}; round errors or costs, "
                "or take fewer rates"
            )
    return [
        Selection(rates=_follow(path, rates), error=error / error_unit, cost=cost / dense)
        for cost, error, path in points
    ]


def homogeneous_rates(errors: Table, *, rate: Rate, blocks: int) -> dict[int, Rate]:
    """The paper's baseline: the `blocks` blocks of least error at `rate` get that rate, the others keep softmax.

    Of blocks with the same error the first is taken.

    Args:
        errors: block → rate → e_ir.
        rate: the one rate, R >= 2 or "linear".
        blocks: how many blocks to convert.

    Returns:
        block → rate, for every block of `errors`.

    Raises:
        SelectionError: more blocks than have an error at `rate`, rate 1, or a bad value.
    """
    if check_rate(rate) == 1:
        raise SelectionError("rate 1 converts nothing; expected R >= 2 or 'linear'")
    candidates = {block: row[rate] for block, row in errors.items() if rate in row}
    for block, error in candidates.items():
        _check_value(error, "error", block, rate)
    if isinstance(blocks, bool) or not isinstance(blocks, int) or not 0 <= blocks <= len(candidates):
        raise SelectionError(
            f"cannot convert {blocks!r} blocks at rate {rate!r}: {len(candidates)} have an error there"
        )
    chosen = sorted(candidates, key=lambda block: (candidates[block], block))[:blocks]
    return {block: rate if block in chosen else 1 for block in sorted(errors)}


def check_tables(errors: Table, costs: Table) -> dict[int, list[Rate]]:
    """The candidate rates of each block, softmax first, blocks ascending; SelectionError as `select_rates` says."""
    if not errors:
        raise SelectionError("errors has no blocks; expected block → rate → error, as distill returns it")
    for one, other, names in ((errors, costs, ("errors", "costs")), (costs, errors, ("costs", "errors"))):
        lacking = sorted(one.keys() - other.keys())
        if lacking:
            raise SelectionError(
                f"block {lacking[0]} is in {names[0]} but not in {names[1]}; name the same blocks in both "
                f"(errors[{lacking[0]}] = {{}} leaves it to softmax)"
            )
    known = _ordered(rate for row in errors.values() for rate in row)
    candidates: dict[int, list[Rate]] = {}
    for block in sorted(errors):
        candidates[block] = known if errors[block] else [1]
        for rate in candidates[block]:
            if rate not in costs[block]:
                raise SelectionError(f"costs of block {block} lack rate {rate!r}; got {sorted(costs[block], key=str)}")
            _check_value(costs[block][rate], "cost", block, rate)
            if rate not in errors[block] and rate != 1:
                raise SelectionError(
                    f"errors of block {block} lack rate {rate!r}; got {sorted(errors[block], key=str)}"
                )
            _check_value(errors[block].get(rate, 0.0), "error", block, rate)
        if costs[block][1] == 0:
            raise SelectionError(f"cost of block {block} at rate 1 is 0; expected the cost of softmax, above 0")
        if errors[block].get(1, 0.0) != 0:
            raise SelectionError(f"error of block {block} at rate 1 is {errors[block][1]}; softmax has error 0")
    return candidates


def _ordered(rates: Iterable[Rate]) -> list[Rate]:
    """Each rate once, with 1: integers ascending, then "linear"."""
    unique = {check_rate(rate) for rate in rates} | {1}
    return sorted(unique, key=lambda rate: (rate == "linear", rate))


def _check_value(value: float, what: str, block: int, rate: Rate) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise SelectionError(f"{what} of block {block} at rate {rate!r} is {value}; expected a finite number >= 0")


def _to_integers(values: Iterable[float]) -> tuple[dict[float, int], int]:
    """Each value times the least power of two that makes all of them integers, and that power."""
    ratios = {value: value.as_integer_ratio() for value in map(float, values)}
    unit = max(denominator for _, denominator in ratios.values())
    return {value: numerator * (unit // denominator) for value, (numerator, denominator) in ratios.items()}, unit


def _undominated(points: list[tuple[int, int, Any]]) -> list[tuple[int, int, Any]]:
    """The points that no other beats, by rising cost; of equal ones the first path in lexicographic order."""
    kept: list[tuple[int, int, Any]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def _follow(path: Any, rates: Mapping[int, list[Rate]]) -> dict[int, Rate]:
    """Block → rate along a chain (((None, i), j), …) of indices into the candidates of each block."""
    indices = []
    while path is not None:
        path, index = path
        indices.append(index)
    return {block: rates[block][index] for block, index in zip(rates, reversed(indices), strict=True)}


def _rounded_up(fraction: float) -> str:
    """Six decimals that are not below `fraction`."""
    return f"{math.ceil(fraction * 10**6) / 10**6:g}"
