"""Markdown tables from the rows of benchmarks."""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

from .rows import Row

UNMEASURED = "not yet measured"
LEVELS = ("op", "block", "transformer")

Headline = tuple[str, str, str, str, bool, str]
"""Level, shape, passes, normalizer, compiled, and what people read."""
HEADLINES: tuple[Headline, ...] = (
    ("op", "wan2.1-1.3b-480p", "forward", "mean", False, "attention with φ, Wan2.1 1.3B at 81×480×832"),
    ("op", "wan2.1-1.3b-480p", "forward + backward", "mean", False, "the same, forward + backward"),
    ("op", "wan2.1-1.3b-480p", "forward", "max", False, "the paper's normalizer, forward"),
    ("transformer", "wan2.1-1.3b-480p", "forward", "mean", True, "whole DiT, compiled, Wan2.1 1.3B at 81×480×832"),
    ("transformer", "wan2.2-5b-704p", "forward", "mean", True, "whole DiT, compiled, Wan2.2 5B at 81×704×1280"),
    ("transformer", "wan2.1-1.3b-480p", "forward + backward", "mean", True, "training step, compiled, Wan2.1 1.3B"),
    ("op", "n8192", "forward", "mean", False, "attention with φ, N = 8,192, {heads} heads × {head_dim}, {dtype}"),
    ("op", "n8192", "forward + backward", "mean", False, "the same, forward + backward"),
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
    for device in dict.fromkeys(row.device for row in rows):
        cases = _by_case(row for row in rows if row.device == device)
        for level, shape, passes, normalizer, compiled, text in HEADLINES:
            for case in cases:
                own = {row.rate: row for row in case if is_own(row, normalizer) and row.compiled == compiled}
                first = case[0]
                if own and (first.level, first.shape, first.passes) == (level, shape, passes):
                    dense = fastest_dense(case)
                    cells = [UNMEASURED if dense is None else _time(dense), *(_ratio(own.get(str(r))) for r in rates)]
                    label = text.format(heads=first.heads, head_dim=first.head_dim, dtype=first.dtype)
                    lines.append(f"| {device if device != shown else ''} | {label} | " + " | ".join(cells) + " |")
                    shown = device
                    break
    if not any(row.cudnn for row in rows):
        lines.append(f"| any GPU | | {UNMEASURED} |" + " |" * len(rates))
    return lines


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
    for device, each in groupby(sorted(rows, key=lambda row: row.device), key=lambda row: row.device):
        mine = list(each)
        first = mine[0]
        versions = {"torch": first.torch, "triton": first.triton, "diffusers": first.diffusers, "cuDNN": first.cudnn}
        listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        lines += [f"### {device}", "", f"`{first.command}`, {first.date[:10]}, {listed}, {first.dtype}.", ""]
        for table in (_cases, _variants, _break_even, _rates):
            if found := table(mine):
                lines += [*found, ""]
    return lines[:-1]


def _cases(rows: Sequence[Row]) -> list[str]:
    rates = sorted({int(row.rate) for row in rows if is_own(row) and row.level != "rates"})
    lines = [
        "| | | N | passes | | dense, ms | " + " | ".join(f"R = {rate}" for rate in rates) + " | peak, MiB |",
        "|---|---|--:|---|---" + "|--:" * (2 + len(rates)) + "|",
    ]
    found = {}
    for case in _by_case(row for row in rows if row.level != "rates"):
        own = {int(row.rate): row for row in case if is_own(row)}
        first = next(iter(own.values()), case[0])
        if first.level != "op" or len(own) == len(rates):
            mode = "" if first.level == "op" else "compiled" if first.compiled else "eager"
            shown = [fastest_dense(case), *(own.get(rate) for rate in rates)]
            peaks = [f"{row.peak_mib:.0f}" for row in shown if row is not None and row.peak_mib is not None]
            cells = [first.level, first.title, f"{first.tokens:,}", first.passes, mode]
            cells += ["" if shown[0] is None else _time(shown[0])]
            cells += [*(_ratio(row, share=True) for row in shown[1:]), " / ".join(peaks)]
            order = (LEVELS.index(first.level), first.title, first.passes, mode, first.tokens)
            found.setdefault(order, "| " + " | ".join(cells) + " |")
    note = (
        "Speed-ups against the fastest dense attention, their 95 % intervals, shares of the FLOP limit; peak memory of "
        "dense attention and of each rate."
    )
    return [*lines, *(found[order] for order in sorted(found)), "", note] if found else []


def _variants(rows: Sequence[Row]) -> list[str]:
    """Every variant of the cases of the shape that comes first."""
    lines = [
        "| | passes | p50, ms | p20, p80 | against the fastest dense | peak, MiB |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row.level == "op" and row.shape == rows[0].shape:
            time = f"{row.p50_ms:.4g} | {row.p20_ms:.4g}, {row.p80_ms:.4g}" if row.p50_ms else f"{row.status} |"
            peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
            lines.append(f"| {row.variant} | {row.passes} | {time} | {_ratio(row, bounds=True)} | {peak} |")
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
        if row.level == "rates":
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


def _by_case(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that took turns."""
    return [list(case) for _, case in groupby(rows, key=lambda row: (row.device, row.date, row.case))]


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


def _time(row: Row) -> str:
    return row.status if row.p50_ms is None else f"{row.p50_ms:.4g}"
