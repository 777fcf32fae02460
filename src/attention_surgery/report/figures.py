"""The report's figures, drawn by matplotlib as inline SVG."""

import io
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

INK, MUTED, ACCENT = "#1f2933", "#8a94a0", "#0b6e99"
CURVE_COLORS = ("#0b6e99", "#3f9142", "#d9822b", "#a23b72", "#5c4b99", "#7a7a52")
WIDTH = 5.8  # inches; text of 10 points is then still read on a phone


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element that scales with the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def errors_figure(errors: Mapping[str, Mapping[str, float]], chosen: Mapping[str, Any]) -> str:
    """Error per block and rate (the paper's Fig. 3), the chosen rate of each block ringed."""
    figure = Figure(figsize=(WIDTH, 3.3))
    axes = figure.subplots()
    blocks = sorted(errors, key=int)
    for color, rate in _colored(next(iter(errors.values()))):
        values = [errors[block][rate] for block in blocks]
        axes.plot([int(b) for b in blocks], values, "o-", color=color, lw=1.4, ms=3.5, label=_rate_label(rate))
    ringed = [(int(b), errors[b][str(r)]) for b, r in chosen.items() if str(r) in errors.get(b, {})]
    if ringed:
        axes.plot(*zip(*ringed, strict=True), "o", mfc="none", mec=INK, ms=9, label="chosen")
    axes.set_xlabel("block")
    axes.set_ylabel("relative L1 error")
    axes.set_ylim(bottom=0)
    _finish(axes)
    return svg(figure)


def pareto_figure(selection: Mapping[str, Any]) -> str:
    """Summed error against the remaining cost: the exact front, homogeneous conversions, the budget, the choice."""
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    points = sorted(selection["homogeneous"], key=lambda point: (str(point["rate"]), point["blocks"]))
    for color, rate in _colored(dict.fromkeys(point["rate"] for point in points)):
        row = [point for point in points if point["rate"] == rate]
        xs, ys = [100 * point["cost"] for point in row], [point["error"] for point in row]
        axes.plot(xs, ys, ".", color=color, ms=5, alpha=0.75, label=f"n blocks, {_rate_label(rate)}")
    front = sorted(selection["pareto_front"], key=lambda point: point["cost"])
    xs, ys = [100 * point["cost"] for point in front], [point["error"] for point in front]
    axes.step(xs, ys, where="post", color=INK, lw=1.4, label="Pareto front (exact)")
    axes.axvline(100 * selection["budget"], color=MUTED, lw=1, ls="--", label="budget")
    axes.plot(100 * selection["cost"], selection["error"], "D", color="#c0392b", ms=7, label="chosen")
    unit = {"flops": "FLOPs"}.get(selection["unit"], selection["unit"])
    axes.set_xlabel(f"remaining {unit} of the blocks, % of all-softmax")
    axes.set_ylabel("summed error")
    _finish(axes)
    return svg(figure)


def curve_figure(curves: Mapping[str, Sequence[tuple[float, float]]], *, xlabel: str, ylabel: str) -> str:
    """Named curves of (x, y) points on one pair of axes."""
    figure = Figure(figsize=(WIDTH, 3.0))
    axes = figure.subplots()
    for color, (name, points) in _colored(curves.items()):
        finite = [(x, y) for x, y in points if math.isfinite(y)]
        if finite:
            marker = "o-" if len(finite) < 12 else "-"
            axes.plot(*zip(*finite, strict=True), marker, color=color, lw=1.4, ms=4, label=name)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    _finish(axes)
    return svg(figure)


def _colored(things: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return zip(itertools.cycle(CURVE_COLORS), things, strict=False)


def _rate_label(rate: Any) -> str:
    return "linear" if str(rate) == "linear" else f"R = {rate}"


def _finish(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=10)
    axes.xaxis.label.set_size(10)
    axes.yaxis.label.set_size(10)
    options = {"frameon": False, "fontsize": 10, "handlelength": 1.4, "columnspacing": 1.2}
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, **options)
