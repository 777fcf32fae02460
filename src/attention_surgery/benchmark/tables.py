"""Markdown tables from the rows of benchmarks."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from .rows import Row

UNMEASURED = "not yet measured"
LEVELS = ("op", "block", "transformer")
PACKAGES = {"flash": "FlashAttention 2", "_flash_3": "FlashAttention 3", "flash_4_hub": "FlashAttention 4"}
"""Kernels that are not PyTorch's own: what was measured with them stands beside what was measured without."""


WIDE = 0.5
"""A 95 % interval of a speed-up that is wider than this much of it says little."""


@dataclass(frozen=True)
class Headline:
    """A line of README's table, for GPUs or for the CPU."""

    text: str
    level: str
    shape: str
    passes: str = "forward"
    normalizer: str = "mean"
    compiled: bool = False
    gpu: bool = True

    def shows(self, case: Sequence[Row]) -> bool:
        """Whether this line is about `case`."""
        first = case[0]
        same = (first.level, first.shape, first.passes) == (self.level, self.shape, self.passes)
        return same and bool(first.cudnn) == self.gpu and bool(self.own(case))

    def own(self, case: Sequence[Row]) -> dict[int, Row]:
        """Rate → our row."""
        own = (row for row in case if is_own(row, self.normalizer) and not row.graphed)
        return {int(row.rate): row for row in own if row.compiled == self.compiled}


T2V, TI2V, BOTH = "wan2.1-1.3b-480p", "wan2.2-5b-704p", "forward + backward"
HEADLINES = (
    Headline("attention with φ, Wan2.1 1.3B at 81×480×832", "op", T2V),
    Headline("the same, forward + backward", "op", T2V, BOTH),
    Headline("the paper's normalizer, forward", "op", T2V, normalizer="max"),
    Headline("whole DiT, compiled, Wan2.1 1.3B at 81×480×832", "transformer", T2V, compiled=True),
    Headline("whole DiT, compiled, Wan2.2 5B at 81×704×1280", "transformer", TI2V, compiled=True),
    Headline("training step, compiled, Wan2.1 1.3B at 81×480×832", "transformer", T2V, BOTH, compiled=True),
    Headline("attention with φ, N = 8,192, {heads} heads × {head_dim}, {dtype}", "op", "n8192", gpu=False),
    Headline("the same, forward + backward", "op", "n8192", BOTH, gpu=False),
)


def is_own(row: Row, normalizer: str = "mean") -> bool:
    """Whether a row is this library's fastest path on its device, on the paper's token set."""
    backend = "triton" if row.cudnn else "eager"
    compiled = row.compiled and row.level == "op"
    return (row.normalizer, row.pattern, row.backend, compiled) == (normalizer, "stride", backend, False)


def speed_table(rows: Sequence[Row]) -> list[str]:
    """README's: the cases that matter most, a line each, device by device."""
    rates = sorted({int(row.rate) for row in rows if is_own(row) and row.level != "rates"}) or [2, 4, 8]
    lines = [
        "| device | | dense, ms | " + " | ".join(f"R = {rate}" for rate in rates) + " |",
        "|---|---" + "|--:" * (1 + len(rates)) + "|",
    ]
    shown = ""
    for mine in _by_device(rows):
        cases, device = _by_case(mine), mine[0].device
        for headline in HEADLINES:
            for some in _by_package(case for case in cases if headline.shows(case)):
                case = _most_measured(some, headline.own)
                own, dense, first = headline.own(case), fastest_dense(case), case[0]
                cells = [UNMEASURED if dense is None else _dense(dense), *(_ratio(own.get(rate)) for rate in rates)]
                text = headline.text.format(heads=first.heads, head_dim=first.head_dim, dtype=first.dtype)
                lines.append(f"| {device if device != shown else ''} | {text} | " + " | ".join(cells) + " |")
                shown = device
    if not any(row.cudnn for row in rows):
        lines.append(f"| any GPU | | {UNMEASURED} |" + " |" * len(rates))
    return lines


def newest(rows: Iterable[Row]) -> list[Row]:
    """`rows` without the cases that were measured again on the same device: of the same level, shape, passes and mode,
    against the same package, with all of their hybrids. What stays is the last one that was not `disturbed`, or the
    last if all were. Rows do not tell which kernels they are of: files of earlier ones are better left out.
    """
    kinds: dict[tuple[str, ...], list[list[Row]]] = {}
    for case in (cases := _by_case(rows)):
        kinds.setdefault(_kind(case), []).append(case)
    return [row for case in cases if not any(_stands_for(other, case) for other in kinds[_kind(case)]) for row in case]


def disturbed(case: Iterable[Row]) -> bool:
    """Whether the interval of a speed-up of ours is wider than half of it, as where other work has the machine too."""
    known = ((row.speedup, row.speedup_low, row.speedup_high) for row in case if is_own(row))
    return any(ratio and low and high and high - low > WIDE * ratio for ratio, low, high in known)


def _kind(case: Sequence[Row]) -> tuple[str, ...]:
    first, dense = case[0], fastest_dense(case)
    package = "" if dense is None else PACKAGES.get(dense.kernel, "")
    return first.device, first.level, first.shape, first.passes, mode_of(first), package


def _stands_for(other: Sequence[Row], case: Sequence[Row]) -> bool:
    """Whether `other`, a case of the same kind, is shown in place of `case`."""
    ours, theirs = ({row.variant for row in some if row.rate != "1" and row.p50_ms} for some in (case, other))
    if not ours or not ours <= theirs or fastest_dense(other) is None:
        return False
    if disturbed(other) != disturbed(case):
        return disturbed(case)
    return other[0].date > case[0].date


def fastest_dense(case: Iterable[Row]) -> Row | None:
    """The baseline of a case's ratios, if it was measured."""
    measured = [row for row in case if row.p50_ms is not None]
    names = {row.baseline for row in measured}
    return next((row for row in measured if row.rate == "1" and row.variant in names), None)


def results_table(rows: Sequence[Row]) -> list[str]:
    """All that was measured, device by device: every case, every variant of the first operator, break-even, rates."""
    if not rows:
        return [f"On a GPU: {UNMEASURED}."]
    lines = [] if any(row.cudnn for row in rows) else [f"On a GPU: {UNMEASURED}.", ""]
    for mine in _by_device(rows):
        first = mine[0]
        versions = {"torch": first.torch, "triton": first.triton, "diffusers": first.diffusers, "cuDNN": first.cudnn}
        listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        runs = [f"{number}. {run}" for run, number in _runs(mine).items()]
        lines += [f"### {first.device}", "", f"{listed}; {first.dtype}. Runs:", "", *runs, ""]
        for table in (_cases, _norms, _variants, _break_even, _rates):
            if found := table(mine):
                lines += [*found, ""]
    return lines[:-1]


def _cases(rows: Sequence[Row]) -> list[str]:
    """Our default at every level, shape and pass, and which run it is of; what is not measured is listed below."""
    runs = _runs(rows)
    rates = sorted({int(row.rate) for row in rows if is_own(row) and row.level != "rates"})
    kinds: dict[tuple[int, str, str, str, int], list[list[Row]]] = {}
    for case in _by_case(row for row in rows if row.level != "rates"):
        if own := _own(case):
            first = next(iter(own.values()))
            key = (LEVELS.index(first.level), first.title, first.passes, mode_of(first), first.tokens)
            kinds.setdefault(key, []).append(case)
    lines, missing = [], []
    found = [(key, some) for key, cases in sorted(kinds.items()) for some in _by_package(cases)]
    for (level, title, passes, mode, tokens), cases in found:
        case = _most_measured(cases, _own)
        dense, own = fastest_dense(case), _own(case)
        if not any(row.p50_ms for row in own.values()):
            missing.append(", ".join(part for part in (LEVELS[level], title, f"N = {tokens:,}", passes, mode) if part))
            continue
        shown = [own.get(rate) for rate in rates]
        peaks = [f"{row.peak_mib:.0f}" for row in (dense, *shown) if row is not None and row.peak_mib is not None]
        cells = [LEVELS[level], title, f"{tokens:,}", passes, mode, "" if dense is None else _dense(dense)]
        cells += [*(_ratio(row, share=True) for row in shown), " / ".join(peaks), str(runs[_run(case[0])])]
        lines.append("| " + " | ".join(cells) + " |")
    if lines:
        head = [
            "| | | N | passes | | dense, ms | " + " | ".join(f"R = {rate}" for rate in rates) + " | peak, MiB | run |",
            "|---|---|--:|---|---" + "|--:" * (3 + len(rates)) + "|",
        ]
        note = (
            "Speed-ups against the fastest dense attention, their 95 % intervals, shares of the FLOP limit; peak "
            "memory of dense attention and of each rate."
        )
        lines = [*head, *lines, "", note]
    if missing:
        lines += ["", f"{UNMEASURED.capitalize()}: {'; '.join(missing)}."]
    return lines


def _norms(rows: Sequence[Row]) -> list[str]:
    """Dense attention with our kernel for QK-norm and rotation, against the same baseline as the hybrids."""
    lines = []
    for row in rows:
        if row.rate == "1" and row.backend and row.speedup is not None:
            dense = f"dense {PACKAGES[row.kernel]}" if row.kernel in PACKAGES else "dense"
            what = ", ".join((row.level, row.title, row.passes, mode_of(row), dense))
            lines.append(f"- {what}: {_ratio(row, bounds=True)}")
    return ["The kernel for QK-norm and RoPE alone, the rest as diffusers computes it:", "", *lines] if lines else []


def _variants(rows: Sequence[Row]) -> list[str]:
    """Every variant of the operator at the shape that comes first, case by case."""
    lines = [
        "| | | p50, ms | p20, p80 | against the fastest dense | peak, MiB |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for case in _by_case(row for row in rows if row.level == "op" and row.shape == rows[0].shape):
        passes = f"**{case[0].passes}**"
        for row in case:
            if row.status != "not measured":
                time = f"{row.p50_ms:.4g} | {row.p20_ms:.4g}, {row.p80_ms:.4g}" if row.p50_ms else f"{row.status} |"
                peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
                lines.append(f"| {passes} | {row.variant} | {time} | {_ratio(row, bounds=True)} | {peak} |")
                passes = ""
    return [f"All of the operator at {rows[0].title}, N = {rows[0].tokens:,}:", "", *lines] if len(lines) > 2 else []


def _break_even(rows: Sequence[Row]) -> list[str]:
    lines = []
    for heads, head_dim, passes, variant, points in sweeps(rows):
        place = break_even([(n, row.speedup) for n, row in points.items() if row.speedup])
        lines.append(f"- {variant}, {passes}, {heads} heads × {head_dim}: {place}")
    return ["The operator breaks even with the fastest dense kernel at N:", "", *lines] if lines else []


def _rates(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| | budget | blocks × rate | error | expected, ms | measured, ms | against dense |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row.level == "rates" and (row.p50_ms or row.budget):
            budget = "" if row.budget is None else f"{row.budget:g}"
            error = "" if row.error is None else f"{row.error:.3f}"
            expected = "" if row.predicted_ms is None else f"{row.predicted_ms:.4g}"
            rates = row.rate if row.budget else f"{row.blocks}×1"
            measured = f"{_time(row)} | {_ratio(row)}" if row.p50_ms else f"{row.note.partition(':')[0]} |"
            lines.append(f"| {row.variant} | {budget} | {rates} | {error} | {expected} | {measured} |")
    return ["Rates chosen by FLOPs and by latency:", "", *lines] if len(lines) > 2 else []


def sweeps(rows: Iterable[Row]) -> list[tuple[int, int, str, str, dict[int, Row]]]:
    """Heads, head dim, passes, variant, and its rows by N, of our operators that were measured at three N or more."""
    found: dict[tuple[int, int, str, str], dict[int, Row]] = {}
    for row in rows:
        if row.level == "op" and is_own(row) and row.p50_ms is not None:
            found.setdefault((row.heads, row.head_dim, row.passes, row.variant), {}).setdefault(row.tokens, row)
    return [(*key, dict(sorted(points.items()))) for key, points in found.items() if len(points) > 2]


def break_even(points: Sequence[tuple[int, float]]) -> str:
    """The N from which on every speed-up is above 1, between two measured ones by their logarithms."""
    slower = [place for place, (_, ratio) in enumerate(points) if ratio < 1]
    if not slower:
        return f"below {points[0][0]:,}"
    if slower[-1] == len(points) - 1:
        return f"above {points[-1][0]:,}"
    (n, ratio), (more, better) = points[slower[-1]], points[slower[-1] + 1]
    part = -math.log(ratio) / (math.log(better) - math.log(ratio))
    return f"about {round(n * (more / n) ** part, -2):,.0f}"


def mode_of(row: Row) -> str:
    """How a case runs, in a word or two: of models compiled or eager."""
    if row.level == "op":
        return "CUDA graph" if row.graphed else ""
    return "compiled" if row.compiled else "eager"


def _run(row: Row) -> str:
    return f"`{row.command}` ({row.date[:10]})"


def _runs(rows: Iterable[Row]) -> dict[str, int]:
    """Command and day → the number of the run."""
    return {run: number for number, run in enumerate(dict.fromkeys(map(_run, rows)), start=1)}


def _by_device(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each device, GPUs first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.device, []).append(row)
    return sorted(found.values(), key=lambda mine: not mine[0].cudnn)


def _by_case(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that took turns."""
    return [list(case) for _, case in groupby(rows, key=lambda row: (row.device, row.date, row.case))]


def _by_package(cases: Iterable[list[Row]]) -> list[list[list[Row]]]:
    """Cases whose fastest dense kernel is PyTorch's own, or that have none; then those of each package."""
    found: dict[str, list[list[Row]]] = {}
    for case in cases:
        dense = fastest_dense(case)
        found.setdefault("" if dense is None else PACKAGES.get(dense.kernel, ""), []).append(case)
    return [found[package] for package in sorted(found)]


def _own(case: Sequence[Row]) -> dict[int, Row]:
    """Rate → our row."""
    return {int(row.rate): row for row in case if is_own(row)}


def _most_measured(cases: Sequence[list[Row]], own: Callable[[Sequence[Row]], dict[int, Row]]) -> list[Row]:
    """Of cases of the same kind the one with the most rates measured, the first of them; none of no cases."""
    return max(cases, key=lambda case: sum(row.p50_ms is not None for row in own(case).values()), default=[])


def _ratio(row: Row | None, *, bounds: bool = False, share: bool = False) -> str:
    if row is None:
        return ""
    if row.speedup is None:
        return UNMEASURED if row.status == "not measured" else row.status
    text = f"{row.speedup:.2f}×"
    if bounds or share:
        text += f" [{row.speedup_low:.2f}, {row.speedup_high:.2f}]"
    if share and row.limit_share is not None:
        text += f" {100 * row.limit_share:.0f} %"
    return text


def _dense(row: Row) -> str:
    """Its time, and the package that its kernel is of."""
    package = PACKAGES.get(row.kernel)
    return f"{_time(row)} ({package})" if package else _time(row)


def _time(row: Row) -> str:
    return row.status if row.p50_ms is None else f"{row.p50_ms:.4g}"
