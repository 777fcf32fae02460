"""Exact choice of rates: against brute force in rational arithmetic, ties and tiny differences included."""

import itertools
import json
import math
import random
import re
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from attention_surgery import selection
from attention_surgery.errors import RateError, SelectionError
from attention_surgery.selection import Selection, homogeneous_rates, pareto_front, select_rates

WAN_FLOPS = {1: 9432667127808, 2: 6290525011968, 4: 4667826290688, 8: 3856476930048, "linear": 3045127569408}


def exact(value):
    """A float as the decimal that it prints as."""
    return Fraction(repr(value))


def every_choice(errors, costs):
    """All choices as (error, cost, rates in block order), errors and costs exact."""
    rows = [[(Fraction(0), exact(costs[b][1]), 1)] for b in sorted(errors)]
    for row, block in zip(rows, sorted(errors), strict=True):
        ordered = sorted(errors[block], key=lambda rate: (rate == "linear", rate))
        row += [(exact(errors[block][r]), exact(costs[block][r]), r) for r in ordered]
    for path in itertools.product(*rows):
        yield sum(p[0] for p in path), sum(p[1] for p in path), tuple(p[2] for p in path)


def best_choice(errors, costs, budget):
    """Brute force. `product` goes through the choices in lexicographic order, and min keeps the first of equals."""
    dense = sum(exact(row[1]) for row in costs.values())
    fitting = [choice for choice in every_choice(errors, costs) if float(choice[1] / dense) <= budget]
    return min(fitting, key=lambda choice: choice[:2], default=None)


def random_instance(seed):
    rng = random.Random(seed)
    rates = (2, 4, "linear")
    kind = seed % 4
    shared = {1: 9.0, 2: 6.3, 4: 4.7, "linear": 3.1}
    errors, costs = {}, {}
    for block in rng.sample(range(40), 5):
        match kind:
            case 0:  # everything differs
                errors[block] = {rate: rng.random() for rate in rates}
                costs[block] = {rate: rng.random() + 0.1 for rate in (1, *rates)}
            case 1:  # many ties
                errors[block] = {rate: rng.choice((0.0, 0.1, 0.2)) for rate in rates}
                costs[block] = {rate: rng.choice((0.1, 0.2, 0.3)) for rate in (1, *rates)}
            case 2:  # blocks that cost the same, errors that differ in the last digits
                tiny = 10.0 ** -rng.choice((7, 9, 12, 15))
                base = dict(zip(rates, (0.05, 0.08, 0.12), strict=True))
                errors[block] = {rate: base[rate] + tiny * rng.random() for rate in rates}
                costs[block] = shared
            case 3:  # values of very different size
                errors[block] = {rate: 10.0 ** rng.uniform(-12, 3) for rate in rates}
                costs[block] = {rate: float(rng.randrange(1, 10**15)) for rate in (1, *rates)}
    return errors, costs, rng


@pytest.mark.parametrize("seed", range(80))
def test_select_rates_equals_brute_force(seed):
    errors, costs, rng = random_instance(seed)
    dense = sum(exact(row[1]) for row in costs.values())
    smallest = min(float(choice[1] / dense) for choice in every_choice(errors, costs))
    for budget in (smallest, rng.uniform(smallest, 1.2), rng.uniform(smallest, 1.2), 1.0):
        error, cost, rates = best_choice(errors, costs, budget) or pytest.fail("no choice fits")
        chosen = select_rates(errors, costs, budget=budget)
        assert tuple(chosen.rates.items()) == tuple(zip(sorted(errors), rates, strict=True))
        assert chosen.error == float(error)
        assert chosen.cost == float(cost / dense)
        assert chosen.cost <= budget == chosen.budget


@pytest.mark.parametrize("seed", range(40))
def test_pareto_front_is_every_undominated_choice(seed):
    errors, costs, _ = random_instance(seed)
    dense = sum(exact(row[1]) for row in costs.values())
    every = {(error, cost) for error, cost, _ in every_choice(errors, costs)}
    undominated = [
        (error, cost)
        for error, cost in every
        if not any(e <= error and c <= cost and (e, c) != (error, cost) for e, c in every)
    ]
    undominated.sort(key=lambda point: point[1])
    expected = [(float(cost / dense), float(error)) for error, cost in undominated]
    front = pareto_front(errors, costs)
    assert [(point.cost, point.error) for point in front] == expected
    for point in front:
        cost = sum(exact(costs[block][rate]) for block, rate in point.rates.items())
        error = sum(exact(errors[block].get(rate, 0.0)) for block, rate in point.rates.items())
        assert (point.cost, point.error, point.budget) == (float(cost / dense), float(error), None)


def wan_instance(blocks=30, seed=0):
    rng = random.Random(seed)
    errors = {
        block: {2: e, 4: 1.5 * e, 8: 2.1 * e, "linear": 4 * e}
        for block in range(blocks)
        for e in [0.05 * rng.lognormvariate(0, 0.6)]
    }
    return errors, {block: WAN_FLOPS for block in range(blocks)}


def test_a_model_of_wans_size_agrees_with_an_independent_solver():
    errors, costs = wan_instance()
    rates = list(WAN_FLOPS)
    e = np.array([[errors[b].get(r, 0.0) for r in rates] for b in errors])
    c = np.array([[costs[b][r] for r in rates] for b in errors]) / sum(row[1] for row in costs.values())
    for budget in (0.35, 0.5, 0.6, 0.75, 0.9):
        solved = milp(
            e.ravel(),
            constraints=[
                LinearConstraint(np.kron(np.eye(len(errors)), np.ones(len(rates))), 1, 1),
                LinearConstraint(c.reshape(1, -1), -np.inf, budget),
            ],
            integrality=np.ones(e.size),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0},
        )
        chosen = select_rates(errors, costs, budget=budget)
        assert chosen.error <= solved.fun + 1e-12
        assert chosen.error == pytest.approx(solved.fun, rel=1e-5)
        assert chosen.cost <= budget


def test_the_front_of_a_large_model_is_small_monotone_and_holds_every_selection():
    errors, costs = wan_instance(blocks=40, seed=1)
    front = pareto_front(errors, costs)
    assert 100 < len(front) < 20_000
    for before, after in itertools.pairwise(front):
        assert before.cost < after.cost and before.error > after.error
    assert set(front[0].rates.values()) == {"linear"}
    assert front[-1].rates == dict.fromkeys(range(40), 1)
    for point in front[:: len(front) // 7]:
        assert select_rates(errors, costs, budget=point.cost).rates == point.rates


def test_homogeneous_conversion_is_never_better():
    errors, costs = wan_instance()
    dense = sum(row[1] for row in costs.values())
    for rate, count in ((4, 20), (8, 15), ("linear", 7)):
        rates = homogeneous_rates(errors, rate=rate, blocks=count)
        cost = sum(costs[block][r] for block, r in rates.items()) / dense
        error = math.fsum(errors[block][r] for block, r in rates.items() if r != 1)
        assert select_rates(errors, costs, budget=cost).error <= error + 1e-12


@pytest.mark.parametrize("budget", [1, 1.0, 1.7, math.inf])
def test_a_budget_of_all_softmax_converts_nothing(budget):
    errors, costs = wan_instance(blocks=6)
    chosen = select_rates(errors, costs, budget=budget)
    assert chosen.rates == dict.fromkeys(range(6), 1)
    assert (chosen.error, chosen.cost) == (0.0, 1.0)


def test_a_hybrid_slower_than_softmax_is_not_chosen():
    errors = {0: {2: 0.1, 4: 0.2}, 1: {2: 0.1, 4: 0.2}}
    costs = {block: {1: 0.87, 2: 1.006, 4: 0.7} for block in errors}
    assert all(2 not in point.rates.values() for point in pareto_front(errors, costs))


def test_ties_go_to_the_cheaper_then_to_the_lower_rates_first():
    errors = {block: {2: 0.1, 4: 0.1, "linear": 0.2} for block in (7, 3)}
    costs = {block: {1: 10.0, 2: 6.0, 4: 5.0, "linear": 5.0} for block in (7, 3)}
    assert select_rates(errors, costs, budget=0.8).rates == {3: 1, 7: 4}
    assert [list(point.rates.items()) for point in pareto_front(errors, costs)] == [
        [(3, 4), (7, 4)],
        [(3, 1), (7, 4)],
        [(3, 1), (7, 1)],
    ]
    zero = {0: {2: 0.0}}
    assert select_rates(zero, {0: {1: 2.0, 2: 1.0}}, budget=1.0).rates == {0: 2}


def test_ties_that_floats_would_not_see():
    """4.7 + 4.7 is 6.3 + 3.1: as binary fractions they differ, and the front would hold both."""
    assert Fraction(4.7) * 2 != Fraction(6.3) + Fraction(3.1)
    errors = {block: {2: 0.3, 4: 0.1, 8: 0.05} for block in range(2)}
    costs = {block: {1: 9.0, 2: 3.1, 4: 4.7, 8: 6.3} for block in range(2)}
    front = pareto_front(errors, costs)
    assert [list(point.rates.values()) for point in front if math.isclose(point.cost, 9.4 / 18)] == [[4, 4]]
    tied = {0: {2: 0.1, 4: 0.3}, 1: {2: 0.2, 4: 0.3}}
    costs = {0: {1: 1.0, 2: 0.5, 4: 0.2}, 1: {1: 1.0, 2: 0.5, 4: 0.2}}
    assert select_rates(tied, costs, budget=0.6).rates == {0: 2, 1: 2}  # 0.1 + 0.2 at a cost of 1.0; 0.3 costs 1.2


def test_order_of_the_tables_does_not_matter():
    errors, costs = wan_instance(blocks=8)
    shuffled = {block: dict(reversed(errors[block].items())) for block in reversed(errors)}
    assert pareto_front(shuffled, costs) == pareto_front(errors, costs)


def test_decimal_budgets_mean_what_they_say():
    """0.6 as a float is a little below six tenths, which the choice costs."""
    assert select_rates({0: {2: 0.1}}, {0: {1: 10, 2: 6}}, budget=0.6).rates == {0: 2}


def test_an_empty_row_leaves_its_block_to_softmax_and_in_the_total():
    errors = {0: {4: 0.1}, 1: {}, 2: {1: 0.0}}
    costs = {block: {1: 10.0, 4: 4.0} for block in errors}
    chosen = select_rates(errors, costs, budget=0.8)
    assert chosen.rates == {0: 4, 1: 1, 2: 1}
    assert chosen.cost == 24 / 30
    with pytest.raises(SelectionError, match=r"costs 0\.8 of all softmax"):
        select_rates(errors, costs, budget=0.79)


def test_rates_that_nobody_distilled_are_no_candidates():
    chosen = select_rates({0: {4: 0.1}}, {0: {1: 10.0, 2: 9.0, 4: 4.0, 8: 1.0}}, budget=0.5)
    assert chosen.rates == {0: 4}


def test_an_infeasible_budget_names_the_smallest_that_is_met():
    errors, costs = wan_instance()
    with pytest.raises(SelectionError, match=r"budget 0\.3 cannot be met.*costs (\S+) of all softmax") as raised:
        select_rates(errors, costs, budget=0.3)
    named = float(re.search(r"costs (\S+) of", str(raised.value))[1])
    smallest = WAN_FLOPS["linear"] / WAN_FLOPS[1]
    assert smallest <= named < smallest + 2e-6
    assert set(select_rates(errors, costs, budget=named).rates.values()) == {"linear"}


@pytest.mark.parametrize("seed", range(50))
def test_the_named_budget_can_always_be_met(seed):
    rng = random.Random(seed)
    errors, costs = {0: {2: 0.1}}, {0: {1: rng.uniform(1, 2), 2: rng.choice((rng.random(), 1e-9, 0.999999999))}}
    with pytest.raises(SelectionError, match="cannot be met") as raised:
        select_rates(errors, costs, budget=1e-12)
    select_rates(errors, costs, budget=float(re.search(r"costs (\S+) of", str(raised.value))[1]))


ERRORS = {0: {2: 0.1, 4: 0.2}, 5: {2: 0.1, 4: 0.3}}
COSTS = {0: {1: 10.0, 2: 6.0, 4: 4.0}, 5: {1: 10.0, 2: 6.0, 4: 4.0}}


@pytest.mark.parametrize(
    ("errors", "costs", "message"),
    [
        ({}, {}, "errors has no blocks"),
        ({0: ERRORS[0]}, COSTS, r"block 5 is in costs but not in errors.*errors\[5\] = \{\}"),
        (ERRORS, {5: COSTS[5]}, "block 0 is in errors but not in costs"),
        (ERRORS | {5: {2: 0.1}}, COSTS, r"block 5 has no error at rate 4; it has errors at \[1, 2\]"),
        (ERRORS, COSTS | {5: {1: 10.0, 4: 4.0}}, "block 5 has no cost at rate 2"),
        (ERRORS, COSTS | {0: {2: 6.0, 4: 4.0}}, "block 0 has no cost at rate 1"),
        (ERRORS | {5: {2: 0.1, 4: 0.3, "linear": 1.0}}, COSTS, "block 0 has no error at rate 'linear'"),
        (ERRORS | {5: {2: math.nan, 4: 0.3}}, COSTS, "error of block 5 at rate 2 is nan"),
        (ERRORS | {5: {2: 0.1, 4: -0.3}}, COSTS, r"error of block 5 at rate 4 is -0\.3"),
        (ERRORS | {5: {2: 0.1, 4: math.inf}}, COSTS, "error of block 5 at rate 4 is inf"),
        (ERRORS, COSTS | {0: {1: 10.0, 2: math.nan, 4: 4.0}}, "cost of block 0 at rate 2 is nan"),
        (ERRORS, COSTS | {0: {1: 0.0, 2: 6.0, 4: 4.0}}, "cost of block 0 at rate 1 is 0"),
        (ERRORS | {5: {1: 0.5, 2: 0.1, 4: 0.3}}, COSTS, r"error of block 5 at rate 1 is 0\.5; softmax has error 0"),
    ],
)
def test_bad_tables(errors, costs, message):
    with pytest.raises(SelectionError, match=message):
        select_rates(errors, costs, budget=0.7)
    with pytest.raises(SelectionError, match=message):
        pareto_front(errors, costs)


def test_a_rate_that_does_not_exist():
    with pytest.raises(RateError, match="rate 'fast' does not exist"):
        select_rates({0: {"fast": 0.1}}, {0: {1: 1.0, "fast": 0.5}}, budget=0.7)


@pytest.mark.parametrize("budget", [0, -0.5, math.nan])
def test_bad_budgets(budget):
    with pytest.raises(SelectionError, match=r"budget is .*; expected a fraction of the all-softmax cost, above 0"):
        select_rates(ERRORS, COSTS, budget=budget)


def test_a_front_that_explodes_is_refused(monkeypatch):
    monkeypatch.setattr(selection, "MAX_POINTS", 100)
    errors = {block: {2: 2.0**-block} for block in range(10)}
    costs = {block: {1: 2.0, 2: 2.0 - 2.0**-block} for block in range(10)}
    with pytest.raises(SelectionError, match="more than 100 choices stand beside each other at block 6"):
        pareto_front(errors, costs)


def test_a_selection_survives_json():
    errors, costs = wan_instance(blocks=5)
    chosen = select_rates(errors, costs, budget=0.5)
    assert "linear" in chosen.rates.values() or 8 in chosen.rates.values()
    assert Selection.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen
    point = pareto_front(errors, costs)[0]
    assert Selection.from_dict(json.loads(json.dumps(point.to_dict()))) == point
    with pytest.raises(SelectionError, match="a selection has the entries"):
        Selection.from_dict({"rates": {}})
    with pytest.raises(RateError, match="rate '-2' does not exist"):
        Selection.from_dict(chosen.to_dict() | {"rates": {"0": -2}})


def test_homogeneous_rates():
    errors = {3: {2: 0.3, 4: 0.5}, 0: {2: 0.2, 4: 0.9}, 1: {2: 0.3, 4: 0.1}, 2: {}}
    assert homogeneous_rates(errors, rate=2, blocks=0) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert homogeneous_rates(errors, rate=2, blocks=2) == {0: 2, 1: 2, 2: 1, 3: 1}
    assert homogeneous_rates(errors, rate=4, blocks=2) == {0: 1, 1: 4, 2: 1, 3: 4}
    assert list(homogeneous_rates(errors, rate=4, blocks=3)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rate": 1, "blocks": 1}, SelectionError, "rate 1 converts nothing"),
        ({"rate": 0, "blocks": 1}, RateError, "rate 0 does not exist"),
        ({"rate": 2, "blocks": 3}, SelectionError, "cannot convert 3 blocks; expected 0 to 2"),
        ({"rate": 2, "blocks": -1}, SelectionError, "cannot convert -1 blocks"),
        ({"rate": 2, "blocks": 1.5}, SelectionError, r"cannot convert 1\.5 blocks"),
        ({"rate": 8, "blocks": 1}, SelectionError, "block 0 has no error at rate 8"),
    ],
)
def test_bad_homogeneous_rates(options, error, message):
    with pytest.raises(error, match=message):
        homogeneous_rates(ERRORS, **options)
    with pytest.raises(SelectionError, match="error of block 5 at rate 2 is nan"):
        homogeneous_rates(ERRORS | {5: {2: math.nan}}, rate=2, blocks=1)
