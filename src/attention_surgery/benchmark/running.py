"""The whole benchmark: verify, compile, time case after case, and write what is there after each."""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from ..cost import LatencyConfig
from ..errors import BenchmarkError, ConfigError
from .cases import Case, plan_cases
from .choices import compare_rates
from .config import BenchmarkConfig
from .environment import describe
from .measure import TRIAL_TOKENS, make_row, measure_case, rank_kernels, with_kernels
from .prepare import Check, Verdicts, allow_recompilations, count_workers, prepare
from .rows import Row, Status, write_rows
from .shapes import dtype_of
from .timing import LEAD_SECONDS, MIN_ROUNDS, TURN_SECONDS
from .variants import dense_kernels
from .verification import describe_error
from .workloads import Place

_log = logging.getLogger("attention_surgery")

RESULTS = "benchmark.csv"
COMPILING_SHARE = 0.25
"""Of the whole time: no compilation begins beforehand after it."""


def find_place(config: BenchmarkConfig) -> Place:
    """Device and dtype of a benchmark. ConfigError for a device that cannot be used."""
    device = LatencyConfig(device=config.device).resolve_device()
    return Place(device, dtype_of(device))


def describe_plan(config: BenchmarkConfig) -> str:
    """What would be measured, a line per case, in order, on a device that need not be here. ConfigError as below."""
    try:
        device = find_place(config).device if config.device == "auto" else torch.device(config.device)
    except RuntimeError as error:
        raise ConfigError(f"device {config.device!r} does not exist: {error}") from error
    cases = plan_cases(config, device)
    lines = [
        f"{device}, {str(dtype_of(device))[6:]}: {len(cases)} cases, as far as they fit "
        f"into {config.minutes:g} minutes; each in rounds for the seconds named, and at least {MIN_ROUNDS} rounds"
    ]
    for case in cases:
        names = ", ".join(variant.name for variant in case.variants)
        lines.append(f"{case.number:3d}  {case.name} (N = {case.shape.tokens:,}; {case.seconds:g} s): {names}")
    return "\n".join(lines)


def run_benchmark(
    config: BenchmarkConfig, output: Path, *, say: Callable[[str], None] = print, cases: Sequence[Case] | None = None
) -> list[Row]:
    """Measure what `config` asks for into `output`/benchmark.csv, which is written anew after every case.

    Args:
        config: what to measure.
        output: folder of the results.
        say: is told what goes on, a line at a time.
        cases: to measure in place of the device's plan.

    Returns:
        All rows; those of what was not measured too, of which `check_rows` says what is wrong.

    Raises:
        BenchmarkError: no kernel for dense attention runs here.
        ConfigError: a device that cannot be used, a shape that the device's preset does not have, no folder.
    """
    began = time.monotonic()
    place = find_place(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    cases = plan_cases(config, place.device) if cases is None else cases
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output} is a file; expected a folder, which is made if it is not there")
    run = describe(place.device, config.command())
    say(f"{run['device']}, {str(place.dtype)[6:]}, torch {run['torch']}, triton {run['triton'] or 'none'}")
    allow_recompilations()

    verdicts: Verdicts = {}
    cases = _resolve(cases, place, verdicts, config.kernel)
    workers = count_workers(config.workers, place.device)
    if workers:
        prepare(cases, place, workers, verdicts, seconds=COMPILING_SHARE * 60 * config.minutes)
        say(f"{len(verdicts)} checks, and compilations, after {time.monotonic() - began:.0f} s")

    rows: list[Row] = []
    for case in cases:
        if time.monotonic() - began + _least_seconds(case) > 60 * config.minutes:
            note = f"would not have ended within {config.minutes:g} minutes"
            rows += [make_row(case, each, place, run, status="not measured", note=note) for each in case.variants]
            say(f"{case.number}/{len(cases)} {case.name}: not measured")
        else:
            prepare([case], place, 0, verdicts)
            fresh = _try_to_measure(case, place, verdicts, run, config.bank)
            rows += fresh
            say(f"{case.number}/{len(cases)} {case.name}, after {time.monotonic() - began:.0f} s")
            for row in fresh:
                say(f"    {_line(row)}")
        write_rows(output / RESULTS, rows)
        gc.collect()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _least_seconds(case: Case) -> float:
    """What a case takes at least: of short calls the rounds that there must be."""
    return max(case.seconds, MIN_ROUNDS * len(case.variants) * (LEAD_SECONDS + TURN_SECONDS))


def check_rows(rows: Sequence[Row]) -> None:
    """BenchmarkError, naming each, if something is wrong or a path of ours does not run: a dense kernel may fail."""
    faults = [
        f"{row.level}, {row.shape}, {row.passes}, {row.variant}: {row.status} ({row.note})"
        for row in rows
        if row.status == "wrong" or (row.status == "does not run" and (row.rate != "1" or row.backend))
    ]
    if faults:
        raise BenchmarkError(f"{len(faults)} rows were not measured for a fault:\n" + "\n".join(faults))


def _resolve(cases: Sequence[Case], place: Place, verdicts: Verdicts, kernel: str | None) -> list[Case]:
    """The cases with kernels by name: dense attention is verified and its kernels race, once per kind of case."""
    ranked: dict[tuple[int, int, int, bool, bool], dict[int, list[str]]] = {}
    rates = sorted({cast(int, variant.rate) for case in cases for variant in case.variants if not variant.dense})
    resolved = []
    for case in cases:
        spec = case.shape.spec
        key = (spec.heads, spec.head_dim, min(case.shape.tokens, TRIAL_TOKENS), case.backward, case.graphed)
        if key not in ranked:
            kernels = tuple(variant for variant in dense_kernels((), place.device) if not variant.compiled)
            prepare([replace(case, scope="op", variants=kernels)], place, 0, verdicts)
            ranked[key] = rank_kernels(
                case.shape, case.backward, place, verdicts, rates=rates, graphed=case.graphed
            )  # fmt: skip
        resolved.append(with_kernels(case, ranked[key], place.device, kernel))
    return resolved


def _try_to_measure(case: Case, place: Place, verdicts: Verdicts, run: dict[str, str], bank: Path | None) -> list[Row]:
    """Rows of one case. One that breaks is logged, and named in every row and at the end; the cases after it go on."""
    try:
        return _measure(case, place, verdicts, run, bank)
    except Exception as error:
        _log.warning("%s breaks", case.name, exc_info=error)
        note = describe_error(error)
        return [make_row(case, each, place, run, status="does not run", note=note) for each in case.variants]


def _measure(case: Case, place: Place, verdicts: Verdicts, run: dict[str, str], bank: Path | None) -> list[Row]:
    """Rows of one case; what is not verified is not timed."""
    rows, able = [], []
    for variant in case.variants:
        verdict = verdicts.get(Check.of(variant, case))
        if verdict is None or verdict.good:  # dense attention within a model is diffusers' own
            able.append(variant)
        else:
            status: Status = "wrong" if verdict.status == "wrong" else "does not run"
            rows.append(make_row(case, variant, place, run, status=status, note=verdict.note))
    checked = replace(case, variants=tuple(able))
    if case.scope == "rates":
        return rows + ([] if rows else compare_rates(checked, place, run, bank))
    return measure_case(checked, place, run) + rows


def _line(row: Row) -> str:
    if row.p50_ms is None:
        return f"{row.variant:32s} {row.status}: {row.note}"
    words = [f"{row.variant:32s} {row.p50_ms:10.3f} ms [{row.p20_ms:.3f}, {row.p80_ms:.3f}]"]
    if row.speedup is not None:
        words.append(f"{row.speedup:6.2f}× [{row.speedup_low:.2f}, {row.speedup_high:.2f}]")
    if row.limit_share is not None and row.limit != 1:
        words.append(f"{100 * row.limit_share:3.0f} % of the limit")
    if row.predicted_ms is not None:
        words.append(f"expected {row.predicted_ms:.1f} ms")
    if row.peak_mib is not None:
        words.append(f"{row.peak_mib:.0f} MiB")
    return "  ".join(words)
