"""Rates chosen by measured latency against rates chosen by FLOPs: what was expected of them, and what they take."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ..cost import LatencyConfig, block_costs
from ..distillation import FeatureMapBank
from ..errors import ConfigError, SelectionError
from ..rates import Rate
from ..selection import Selection, Table, select_rates
from .cases import Case
from .measure import make_row, timing_columns
from .rows import Row
from .timing import interleave
from .workloads import Place, build_transformer, transformer_calls, transformer_inputs, wear

BUDGETS = (0.85, 0.7, 0.55)
"""Fractions of the all-softmax cost."""
LATENCY_SECONDS = 10.0
DENSE = ("", 1.0)


def compare_rates(case: Case, place: Place, run: Mapping[str, str], bank: Path | None) -> list[Row]:
    """A row for the dense transformer and for each unit's choice at each of `BUDGETS`, all run in turns.

    By latency a forward is expected to take the sum of its blocks' seconds, known before it runs. FLOPs only say which
    part of the dense forward it should take, and that one is measured here.
    """
    dense, hybrid, *_ = case.variants
    rates: list[Rate] = [variant.rate for variant in case.variants]
    costs = measure_costs(case, place, rates)
    errors = read_errors(bank, case.shape.spec.blocks, rates[1:])
    chosen: dict[tuple[str, float], Selection] = {}
    notes: dict[tuple[str, float], str] = {}
    for budget, unit in product(BUDGETS, costs):
        try:
            chosen[unit, budget] = select_rates(errors, costs[unit], budget=budget)
        except SelectionError as error:
            notes[unit, budget] = str(error)

    model, inputs = build_transformer(case.shape, place), transformer_inputs(case.shape, place)
    models = {DENSE: wear(model, dense, 1)}
    models |= {key: wear(model, hybrid, selection.rates) for key, selection in chosen.items()}
    calls = transformer_calls(models, inputs, False)
    for call in calls.values():
        call()
    times = interleave(calls, place.device, seconds=case.seconds)

    columns = {key: timing_columns(values, times[DENSE], dense.name) for key, values in times.items()}
    expected = 1000 * sum(row[1] for row in costs["latency"].values())
    rows = [make_row(case, dense, place, run, status="measured", predicted_ms=expected, **columns[DENSE])]
    for budget, unit in product(BUDGETS, costs):
        known: dict[str, Any] = {"variant": f"by {unit}", "rate": "", "unit": unit, "budget": budget}
        if (unit, budget) in notes:
            known |= {"status": "not measured", "note": notes[unit, budget]}
        else:
            selection = chosen[unit, budget]
            seconds = sum(costs["latency"][block][rate] for block, rate in selection.rates.items())
            known |= columns[unit, budget] | {
                "status": "measured",
                "rate": describe_rates(selection.rates),
                "error": selection.error,
                "predicted_ms": 1000 * seconds if unit == "latency" else columns[DENSE]["p50_ms"] * selection.cost,
            }
        rows.append(make_row(case, hybrid, place, run, **known))
    return rows


def measure_costs(case: Case, place: Place, rates: Sequence[Rate]) -> dict[str, Table]:
    """Costs of every block at every rate, in FLOPs and in seconds."""
    video = case.shape.video or ()
    size: dict[str, Any] = dict(zip(("num_frames", "height", "width"), video, strict=True))
    options: dict[str, Any] = {"device": str(place.device), "dtype": str(place.dtype).removeprefix("torch.")}
    timing = LatencyConfig(**options, max_seconds=LATENCY_SECONDS, attention_backend=case.variants[0].kernel)
    return {
        "flops": block_costs(case.shape.spec, rates, unit="flops", **size),
        "latency": block_costs(case.shape.spec, rates, unit="latency", latency=timing, **size),
    }


def read_errors(bank: Path | None, blocks: int, rates: Sequence[Rate]) -> Table:
    """The errors of a bank at `rates`, or the declared ones. ConfigError for a bank of other blocks or rates."""
    if bank is None:
        return declared_errors(blocks, rates)
    errors = FeatureMapBank.from_pretrained(bank).errors
    if len(errors) != blocks or any(set(rates) - row.keys() for row in errors.values()):
        raise ConfigError(f"{bank} lacks errors of {blocks} blocks at rates {list(rates)}; leave the bank out")
    return {block: {rate: row[rate] for rate in rates} for block, row in errors.items()}


def declared_errors(blocks: int, rates: Sequence[Rate]) -> Table:
    """Errors to choose by where there is no bank: 0.03·log2(R)·(1 + (7i mod 10)/5) in block i. No measurement.

    Like distilled ones they rise with the rate, and differ from block to block.
    """
    return {
        i: {rate: round(0.03 * (int(rate).bit_length() - 1) * (1 + 7 * i % 10 / 5), 6) for rate in rates}
        for i in range(blocks)
    }


def describe_rates(rates: Mapping[int, Rate]) -> str:
    """How many blocks have which rate: "10×1 4×2 16×8"."""
    counts = Counter(rates.values())
    return " ".join(f"{counts[rate]}×{rate}" for rate in sorted(counts, key=lambda rate: (rate == "linear", rate)))
