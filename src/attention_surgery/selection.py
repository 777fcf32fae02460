"""Choosing a rate per block (§3.3, Eq. 8): a multiple-choice knapsack, solved exactly, and its whole Pareto front.

Errors and costs are taken as the decimals that they print as, which are integers over a common denominator. On these
integers sums, comparisons and ties are exact, where floats find 0.1 + 0.2 above 0.3 and a mixed-integer solver takes
errors that differ by 1e-7 for equal. Blocks are added one by one to the set of choices that none other beats in both
error and cost; on Wan's 30 or 40 blocks, which all cost the same, that set has about a thousand members.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .errors import SelectionError
from .rates import Rate, check_rate, parse_rate

Table = Mapping[int, Mapping[Rate, float]]
"""block → rate → value."""

Point = tuple[int, int, Any]
"""Cost, error, and the path there: (path through the blocks before, rank of this block's rate), None at the start."""

MAX_POINTS = 250_000
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
        rates: dict[int, Rate] = {int(block): parse_rate(str(rate)) for block, rate in values["rates"].items()}
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
    if not budget > 0:
        raise SelectionError(f"budget is {budget}; expected a fraction of the all-softmax cost, above 0")
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
        SelectionError: as `select_rates`, or more than `MAX_POINTS` points.
    """
    errors, costs = _whole_tables(errors, costs)
    exact_errors, error_unit = _to_integers(errors)
    exact_costs, _ = _to_integers(costs)
    dense = sum(row[1] for row in exact_costs.values())

    points: list[Point] = [(0, 0, None)]
    for block, row in exact_costs.items():
        steps = [(cost, exact_errors[block][rate], rank) for rank, (rate, cost) in enumerate(row.items())]
        points = _undominated(
            (cost + more_cost, error + more_error, (path, rank))
            for more_cost, more_error, rank in steps
            for cost, error, path in points
        )
        if len(points) > MAX_POINTS:
            raise SelectionError(
                f"more than {MAX_POINTS} choices stand beside each other at block {block}; round errors or costs, "
                "or take fewer rates"
            )
    return [
        Selection(rates=_follow(path, costs), error=error / error_unit, cost=cost / dense)
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
        SelectionError: more blocks than have errors, rate 1, a missing entry or a bad value.
    """
    if check_rate(rate) == 1:
        raise SelectionError("rate 1 converts nothing; expected R >= 2 or 'linear'")
    candidates = {block: _whole_row(errors[block], "error", block, [rate])[rate] for block in _convertible(errors)}
    if isinstance(blocks, bool) or not isinstance(blocks, int) or not 0 <= blocks <= len(candidates):
        raise SelectionError(
            f"cannot convert {blocks!r} blocks; expected 0 to {len(candidates)}, those that have errors"
        )
    chosen = sorted(candidates, key=lambda block: (candidates[block], block))[:blocks]
    return {block: rate if block in chosen else 1 for block in sorted(errors)}


def _whole_tables(errors: Table, costs: Table) -> tuple[Table, Table]:
    """Both tables checked and with the same entries: blocks ascending, candidates ascending from 1, "linear" last."""
    if not errors:
        raise SelectionError("errors has no blocks; expected block → rate → error, as distill returns it")
    for block in sorted(errors.keys() ^ costs.keys()):
        has, lacks = ("errors", "costs") if block in errors else ("costs", "errors")
        raise SelectionError(
            f"block {block} is in {has} but not in {lacks}; name the same blocks in both "
            f"(errors[{block}] = {{}} leaves it to softmax)"
        )
    named: set[Rate] = {1}
    named.update(check_rate(rate) for row in errors.values() for rate in row)
    ascending = sorted(named, key=lambda rate: (rate == "linear", rate))
    convertible = _convertible(errors)
    whole_errors: dict[int, dict[Rate, float]] = {}
    whole_costs: dict[int, dict[Rate, float]] = {}
    for block in sorted(errors):
        rates = ascending if block in convertible else [1]
        whole_errors[block] = _whole_row({1: 0.0, **errors[block]}, "error", block, rates)
        whole_costs[block] = _whole_row(costs[block], "cost", block, rates)
        if whole_errors[block][1] != 0:
            raise SelectionError(f"error of block {block} at rate 1 is {errors[block][1]}; softmax has error 0")
        if whole_costs[block][1] == 0:
            raise SelectionError(f"cost of block {block} at rate 1 is 0; expected the cost of softmax, above 0")
    return whole_errors, whole_costs


def _whole_row(row: Mapping[Rate, float], what: str, block: int, rates: Iterable[Rate]) -> dict[Rate, float]:
    """The finite, non-negative value of each of `rates`. SelectionError names the one that is not there or not so."""
    values: dict[Rate, float] = {}
    for rate in rates:
        if rate not in row:
            raise SelectionError(f"block {block} has no {what} at rate {rate!r}; it has {what}s at {list(row)}")
        if not (math.isfinite(row[rate]) and row[rate] >= 0):
            raise SelectionError(
                f"{what} of block {block} at rate {rate!r} is {row[rate]}; expected a finite number >= 0"
            )
        values[rate] = float(row[rate])
    return values


def _convertible(errors: Table) -> list[int]:
    """The blocks with an error at any rate but softmax, ascending."""
    return sorted(block for block, row in errors.items() if row.keys() - {1})


def _to_integers(table: Table) -> tuple[dict[int, dict[Rate, int]], int]:
    """The table times the least number that makes all of it integers, and that number."""
    unit = math.lcm(*(Fraction(repr(value)).denominator for row in table.values() for value in row.values()))
    return {
        block: {rate: int(Fraction(repr(value)) * unit) for rate, value in row.items()} for block, row in table.items()
    }, unit


def _undominated(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats, by rising cost; of equal ones the first path in lexicographic order."""
    kept: list[Point] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def _follow(path: Any, table: Table) -> dict[int, Rate]:
    """Block → rate along a path: the rank of each block's choice among its row of `table`."""
    ranks = []
    while path is not None:
        path, rank = path
        ranks.append(rank)
    return {block: list(row)[rank] for (block, row), rank in zip(table.items(), reversed(ranks), strict=True)}


def _rounded_up(fraction: float) -> str:
    """`fraction` with at most six decimals, and not below it."""
    millionths = math.floor(fraction * 10**6)
    while millionths / 10**6 < fraction:
        millionths += 1
    return f"{millionths / 10**6:.6f}".rstrip("0").removesuffix(".")
