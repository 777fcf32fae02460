"""Figures of a benchmark, drawn from its CSV file alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from ..files import write_atomic
from .rows import Row, read_rows
from .shapes import SWEEPS
from .tables import break_even, is_own, mode_of, sweeps

INK, MUTED = "#1f2933", "#8a94a0"
COLORS = ("#0b6e99", "#3f9142", "#d9822b", "#a23b72", "#5c4b99", "#7a7a52")
SWEPT = {name for names in SWEEPS.values() for name in names}


def draw_figures(source: Path) -> list[Path]:
    """Write SOURCE_time.svg and SOURCE_speedup.svg beside `source`, as far as it has their rows; returns the files.

    DataError for a file that cannot be read.
    """
    rows = read_rows(source)
    written = []
    for name, draw in (("time", time_figure), ("speedup", speedup_figure)):
        if (figure := draw(rows)) is not None:
            path = source.with_name(f"{source.stem}_{name}.svg")
            with write_atomic(path) as temporary, rc_context({"svg.hashsalt": path.name}):  # the same file every time
                figure.savefig(temporary, format="svg", metadata={"Date": None})
            written.append(path)
    return written


def time_figure(rows: Sequence[Row]) -> Figure | None:
    """Time of the operator against N, dense and hybrid, a panel per pass; None if no sweep was measured."""
    found = sweeps(rows)
    panels = list(dict.fromkeys(map(_panel, found)))
    if not panels:
        return None
    figure = Figure(figsize=(4.6 * len(panels) + 0.4, 3.8), layout="constrained")
    figure.suptitle(rows[0].device, fontsize=9, color=INK)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        mine = [each for each in found if _panel(each) == panel]
        dense: dict[int, float] = {}
        for color, (*_, variant, points) in zip(COLORS, mine, strict=False):
            ratios = [(n, row.speedup) for n, row in points.items() if row.speedup]
            times = {n: row.p50_ms for n, row in points.items() if row.p50_ms}
            dense |= {n: times[n] * ratio for n, ratio in ratios if n in times}
            label = f"{variant.partition(' ')[0].replace('=', ' = ')}, break-even {break_even(ratios)}"
            axes.loglog(list(times), list(times.values()), "o-", color=color, lw=1.3, ms=3.5, label=label)
        ordered = sorted(dense.items())
        axes.loglog(*zip(*ordered, strict=True), "s--", color=INK, lw=1.3, ms=3.5, label="fastest dense")
        axes.set_title(panel, fontsize=9, color=INK)
        axes.set_xlabel("N, tokens", fontsize=8)
        axes.set_xscale("log", base=2)
        _tidy(axes)
        axes.legend(frameon=False, fontsize=7)
    figure.axes[0].set_ylabel("ms", fontsize=8)
    return figure


def _panel(sweep: tuple[int, int, str, str, dict[int, Row]]) -> str:
    heads, head_dim, passes, _, points = sweep
    words = (passes, mode_of(next(iter(points.values()))), f"{heads} heads × {head_dim}")
    return ", ".join(word for word in words if word)


def speedup_figure(rows: Sequence[Row]) -> Figure | None:
    """Speed-ups of every case that is no sweep, with their intervals and FLOP limits; None if nothing was measured."""
    own = [row for row in rows if is_own(row) and row.level != "rates" and row.speedup]
    own = [row for row in own if row.shape == rows[0].shape or row.shape not in SWEPT]
    first = {(_case_label(row), row.rate): row for row in reversed(own)}
    own = [row for row in own if row is first[_case_label(row), row.rate]]
    labels = list(dict.fromkeys(map(_case_label, own)))
    if not labels:
        return None
    rates = sorted({int(row.rate) for row in own})
    height = 0.8 / len(rates)
    figure = Figure(figsize=(8.4, 0.9 + 0.42 * len(labels)), layout="constrained")
    figure.suptitle(rows[0].device, fontsize=9, color=INK)
    axes: Any = figure.subplots()
    for row in own:
        place = rates.index(int(row.rate))
        y = labels.index(_case_label(row)) + (place - (len(rates) - 1) / 2) * height
        low, high = (abs((bound or 0) - (row.speedup or 0)) for bound in (row.speedup_low, row.speedup_high))
        axes.barh(y, row.speedup, height=0.9 * height, color=COLORS[place % len(COLORS)],
                  xerr=[[low], [high]], error_kw={"lw": 0.7, "ecolor": INK}, label=f"R = {row.rate}")  # fmt: skip
        axes.plot([row.limit] * 2, [y - height / 2, y + height / 2], color=MUTED, lw=1.2, label="FLOP limit")
    axes.axvline(1, color=INK, lw=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the fastest dense attention", fontsize=8)
    _tidy(axes)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": len(handles)}
    axes.legend(handles.values(), handles.keys(), frameon=False, fontsize=7, **above)
    return figure


def _case_label(row: Row) -> str:
    words = ", ".join(word for word in (row.level, mode_of(row), row.passes) if word)
    return f"{words}\n{row.title}, N = {row.tokens:,}"


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e7eb", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=7)
