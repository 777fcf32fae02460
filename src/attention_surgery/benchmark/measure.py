"""One case: its variants made ready, timed in turns, and turned into rows."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from ..cost.flops import block_flops
from ..errors import BenchmarkError
from ..rates import Rate
from .cases import Case
from .kernels import dispatched_kernels, own_kernels
from .prepare import Check, Verdicts
from .rows import Row, Status
from .shapes import Shape
from .timing import TURN_SECONDS, Summary, interleave, peak_memory, speedup
from .variants import Variant, dense_kernels, own_backend
from .verification import describe_error, verify_at_size
from .workloads import Place, WrongGraph, make_calls, operator_calls

_log = logging.getLogger("attention_surgery")

MIB = 2**20
TRIAL_TOKENS = 16384
TRIAL_SECONDS = 0.3


def rank_kernels(
    shape: Shape, backward: bool, place: Place, verdicts: Verdicts, *, rates: Sequence[int] = (), graphed: bool = False
) -> dict[int, list[str]]:
    """The dense kernels that are right here, the fastest first, at up to 16k tokens; without those to be compiled.

    Of rate 1 on all keys; of each of `rates` on every R-th key, and of those that the dispatcher takes alone. With
    `graphed` they race as CUDA graphs.

    BenchmarkError if none of those that diffusers' models can use is among them.
    """
    trial = replace(shape, tokens=min(shape.tokens, TRIAL_TOKENS))
    kernels = tuple(
        replace(variant, graphed=graphed) for variant in dense_kernels((), place.device) if not variant.compiled
    )
    case = Case(scope="op", shape=trial, variants=kernels, backward=backward)
    found = {variant: verdicts[Check.of(variant, case)] for variant in kernels}
    able = tuple(variant for variant in kernels if found[variant].good)
    if not {variant.kernel for variant in able} & set(own_kernels(place.device)):
        notes = "; ".join(f"{variant.kernel}: {verdict.note}" for variant, verdict in found.items())
        raise BenchmarkError(f"no dense attention of PyTorch's own runs here: {notes}")
    ranked = {}
    for rate in (1, *rates):
        usable = [each for each in able if rate == 1 or each.kernel in dispatched_kernels(place.device)]
        calls = operator_calls(trial, tuple(usable), backward, place, every=rate)
        for each in usable:
            try:
                calls[each]()
            except Exception as error:  # a kernel that does not take a view of some keys is out of the race
                _log.warning("%s does not run on every %s-th key", each.kernel, rate, exc_info=error)
                del calls[each]
        if not {each.kernel for each in calls} & set(own_kernels(place.device)):
            raise BenchmarkError(f"no attention of PyTorch's own runs on every {rate}-th key; the log says why")
        seconds = TRIAL_SECONDS / (1 if rate == 1 else 3)
        times = interleave(calls, place.device, seconds=seconds, min_rounds=3, lead=TURN_SECONDS)
        ranked[rate] = [each.kernel for each in sorted(calls, key=lambda each: Summary.of(times[each]).p50)]
    return ranked


def with_kernels(case: Case, ranked: Mapping[int, Sequence[str]], device: torch.device, kernel: str | None) -> Case:
    """`case` with a kernel's name for every FASTEST, and with dense attention among its variants.

    Dense attention joins with the fastest kernel of PyTorch's own, and with the fastest of all that can be used, if
    that is another one; in a whole transformer also with our norms. The hybrids get `kernel`, or the fastest at their
    rate (for rates by latency the former).
    """
    own = next(name for name in ranked[1] if name in own_kernels(device))

    def fastest(variant: Variant) -> str:
        return own if case.scope == "rates" else ranked[cast(int, variant.rate)][0]

    variants = [variant.with_kernel(kernel or fastest(variant)) for variant in case.variants]
    if not any(variant.stock for variant in variants):
        usable = {"op": ranked[1], "rates": [own]}.get(case.scope, dispatched_kernels(device))
        names = dict.fromkeys((own, next(name for name in ranked[1] if name in usable)))
        dense = [Variant(rate=1, kernel=name, compiled=case.compiled, graphed=case.graphed) for name in names]
        if case.scope == "transformer" and own_backend(device) == "triton":
            dense.append(replace(dense[-1], backend="triton"))
        variants = [*dense, *variants]
    return replace(case, variants=tuple(variants))


def measure_case(case: Case, place: Place, run: Mapping[str, str]) -> list[Row]:
    """A row for each variant of `case`, all of which are verified at a small size; for one that is not timed, why."""
    calls = make_calls(case, place)
    rows: dict[Variant, Row] = {}
    for variant in case.variants:
        status, note = _try_at_size(case, variant, calls[variant], place)
        if status != "measured":
            del calls[variant]
            rows[variant] = make_row(case, variant, place, run, status=status, note=note)
    peaks = {variant: None if variant.graphed else peak_memory(call, place.device) for variant, call in calls.items()}
    times = interleave(calls, place.device, seconds=case.seconds) if calls else {}
    medians = {variant: Summary.of(values).p50 for variant, values in times.items()}
    dense = min((variant for variant in times if variant.stock), key=medians.__getitem__, default=None)
    whole = count_flops(case, 1)
    for variant, values in times.items():
        flops, peak = count_flops(case, variant.rate), peaks[variant]
        columns = {"flops": flops, "limit": whole / flops, "peak_mib": None if peak is None else peak / MIB}
        if dense is not None:
            columns |= timing_columns(values, times[dense], dense.name)
            columns["limit_share"] = columns["speedup"] * flops / whole
        else:
            columns |= timing_columns(values)
        rows[variant] = make_row(case, variant, place, run, status="measured", **columns)
    return [rows[variant] for variant in case.variants]


def _try_at_size(case: Case, variant: Variant, call: Callable[[], object], place: Place) -> tuple[Status, str]:
    """Makes the first call; whether the variant may be timed, and why not."""
    try:
        result = call()
        kernels = case.scope == "op" and variant.backend == "triton"
        wrong = verify_at_size(variant, case.shape, place) if kernels else None
    except WrongGraph as error:
        return "wrong", str(error)
    except Exception as error:  # named in the table; a hybrid that does not run ends the command with an error
        _log.warning("%s: %s does not run", case.name, variant.name, exc_info=error)
        return "does not run", describe_error(error)
    output = result[0] if isinstance(result, tuple) else result
    if wrong is None and isinstance(output, torch.Tensor) and not output.isfinite().all():
        wrong = "the output is not finite"
    return ("wrong", wrong) if wrong else ("measured", "")


def timing_columns(times: Sequence[float], baseline: Sequence[float] = (), name: str = "") -> dict[str, Any]:
    """The columns that follow from one variant's times and those of the baseline of that name, if there is one."""
    summary = Summary.of(times)
    columns = {"rounds": len(times), "p20_ms": summary.p20, "p50_ms": summary.p50, "p80_ms": summary.p80}
    if not name:
        return columns
    ratio, low, high = speedup(baseline, times)
    return columns | {"baseline": name, "speedup": ratio, "speedup_low": low, "speedup_high": high}


def count_flops(case: Case, rate: Rate) -> int:
    """Of one forward at one rate: of the operator with φ, of a block, or of all blocks."""
    block = block_flops(case.shape.spec, rate, case.shape.tokens)
    if case.scope == "op":
        return block.core + block.feature_maps
    return block.total if case.scope == "block" else block.total * case.shape.spec.blocks


def make_row(
    case: Case, variant: Variant, place: Place, run: Mapping[str, str], /, *, status: Status, **values: Any
) -> Row:
    """A row of `case`, with what is known of `variant` before it is measured."""
    shape = case.shape
    known: dict[str, Any] = {
        "case": case.number,
        "level": case.scope,
        "shape": shape.name,
        "title": shape.title,
        "tokens": shape.tokens,
        "heads": shape.spec.heads,
        "head_dim": shape.spec.head_dim,
        "blocks": {"op": 0, "block": 1}.get(case.scope, shape.spec.blocks),
        "dtype": str(place.dtype).removeprefix("torch."),
        "passes": "forward + backward" if case.backward else "forward",
        "variant": variant.name,
        "rate": str(variant.rate),
        "normalizer": "" if variant.dense else variant.normalizer,
        "pattern": "" if variant.dense else variant.pattern,
        "backend": variant.backend,
        "kernel": variant.kernel,
        "compiled": variant.compiled,
        "graphed": variant.graphed,
    }
    columns: dict[str, Any] = known | dict(run) | {"status": status} | values
    return Row(**columns)
