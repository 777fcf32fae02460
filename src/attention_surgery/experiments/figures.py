"""Figures of the experiments, drawn from their rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from ..files import write_atomic
from ..generation import read_video
from ..rates import Rate
from .plans import Experiment
from .records import Row

INK, MUTED = "#1f2933", "#8a94a0"
RATE_COLORS = ("#0b6e99", "#3f9142", "#d9822b", "#a23b72", "#5c4b99", "#7a7a52")
FRAMES = 4
TOTAL = "Total − teacher"


def errors(path: Path, banks: Mapping[str, Sequence[Row]]) -> None:
    """Mean error of every block, one panel per rate, one line per maps; bars span the seeds.

    Of several maps, only the rates that at least two of them have.
    """
    every = [rate for rows in banks.values() for rate in rows[0]["errors"]["0"]]
    shown = {rate for rate in every if len(banks) == 1 or every.count(rate) > 1}
    rates = sorted(shown, key=lambda rate: np.inf if rate == "linear" else int(rate))
    legend = 3.4 if len(banks) > 1 else 0.0
    figure = Figure(figsize=(2.6 * len(rates) + 1.4 + legend, 2.8), layout="constrained")
    for axes, rate in zip(figure.subplots(1, len(rates), sharey=True, squeeze=False)[0], rates, strict=True):
        for color, (label, rows) in zip(_colors(len(banks)), banks.items(), strict=True):
            if rate in rows[0]["errors"]["0"]:
                values = np.array([[row["errors"][block][rate] for block in row["errors"]] for row in rows])
                mean = values.mean(0)
                spread = np.abs(np.stack([values.min(0), values.max(0)]) - mean)
                axes.errorbar(range(len(mean)), mean, yerr=spread, fmt="o-", ms=3, lw=1.2, color=color, label=label)
        axes.set_title(_rate_name(rate), fontsize=9)
        axes.set_xlabel("block", fontsize=8)
        _tidy(axes)
    figure.axes[0].set_ylim(bottom=0)  # of all panels, once all of them have been drawn
    figure.axes[0].set_ylabel("relative L1 error", fontsize=8)
    if len(banks) > 1:
        named = {}
        for axes in figure.axes:
            handles, labels = axes.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        figure.legend(named.values(), named.keys(), frameon=False, fontsize=8, loc="outside right center")
    _save(figure, path)


def scores(path: Path, plan: Experiment, rows: Sequence[Row]) -> None:
    """Total score less the teacher's, and velocity error, of every trial: by label, remaining FLOPs or steps."""
    draw = {"labels": _by_label, "flops": _by_flops, "steps": _by_steps}[plan.axis]
    tall = 0.26 * len(rows) + 1.1 if plan.axis == "labels" else 3.4
    figure = Figure(figsize=(9, tall), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=plan.axis == "labels")
    draw(figure, left, right, plan, rows)
    for axes in (left, right):
        _tidy(axes)
    _save(figure, path)


def _by_label(figure: Figure, left: Any, right: Any, plan: Experiment, rows: Sequence[Row]) -> None:
    """A line each, the first at the top."""
    places = range(len(rows))
    for place, row in zip(places, rows, strict=True):
        left.errorbar([row[TOTAL]], [place], xerr=_total_bars(row), fmt="o", ms=4, lw=1, color=RATE_COLORS[0])
        right.errorbar([row["velocity error"]], [place], xerr=_velocity_bars(row), fmt="o", ms=4, lw=1, color=INK)
    left.set_yticks(places, [row["trial"] for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.axvline(0, color=MUTED, lw=1, ls="--")
    left.set_xlabel("total score − the teacher's, percentage points", fontsize=8)
    right.set_xlabel("velocity error", fontsize=8)
    right.set_xlim(left=0)


def _by_flops(figure: Figure, left: Any, right: Any, plan: Experiment, rows: Sequence[Row]) -> None:
    """A colour per rate, a point per number of blocks."""
    rates = list(dict.fromkeys(trial.rate for trial in plan.trials.values()))
    for rate, color in zip(rates, RATE_COLORS, strict=False):
        found = [row for row in rows if plan.trials[row["trial"]].rate == rate]
        x = [row["remaining FLOPs %"] for row in found]
        for axes, name, bars in ((left, TOTAL, _total_bars), (right, "velocity error", _velocity_bars)):
            spans = [bars(row) for row in found]
            whole = None if any(span is None for span in spans) else np.concatenate(spans, axis=1)
            y = [row[name] for row in found]
            axes.errorbar(x, y, yerr=whole, fmt="o-", ms=4, lw=1, color=color, label=_rate_name(rate))
            side = {"xytext": (-5, 3), "ha": "right"} if axes is left else {"xytext": (5, 3)}  # where no line runs
            for row, at, value in zip(found, x, y, strict=True):
                label = str(plan.trials[row["trial"]].blocks)
                axes.annotate(label, (at, value), textcoords="offset points", fontsize=7, color=color, **side)
    left.axhline(0, color=MUTED, lw=1, ls="--")
    left.set_ylabel("total score − the teacher's, points", fontsize=8)
    right.set_ylabel("velocity error", fontsize=8)
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("remaining FLOPs of the blocks, % (numbers: converted blocks)", fontsize=8)
    right.legend(frameon=False, fontsize=8)


def _by_steps(figure: Figure, left: Any, right: Any, plan: Experiment, rows: Sequence[Row]) -> None:
    """A line per objective, from what they start at."""
    for objective, color in (("flow", RATE_COLORS[0]), ("teacher", RATE_COLORS[2])):
        found = [row for row in rows if not (t := plan.trials[row["trial"]]).steps or t.objective == objective]
        x = [plan.trials[row["trial"]].steps for row in found]
        for axes, name, bars in ((left, TOTAL, _total_bars), (right, "velocity error", _velocity_bars)):
            spans = [bars(row) for row in found]
            whole = None if any(span is None for span in spans) else np.concatenate(spans, axis=1)
            label = "flow matching" if objective == "flow" else "the teacher's velocity"
            axes.errorbar(x, [row[name] for row in found], yerr=whole, fmt="o-", ms=4, lw=1, color=color, label=label)
    left.axhline(0, color=MUTED, lw=1, ls="--")
    left.set_ylabel("total score − the teacher's, points", fontsize=8)
    right.set_ylabel("velocity error", fontsize=8)
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("fine-tuning steps", fontsize=8)
    right.legend(frameon=False, fontsize=8)


def frames(path: Path, caption: str, files: Mapping[str, Path]) -> None:
    """The same caption and noise through every model: a row each, frames at equal distances."""
    clips = {label: read_video(file) for label, file in files.items()}
    side, gap, margin = 128, 4, 170
    sheet = Image.new("RGB", (margin + FRAMES * (side + gap), 24 + len(clips) * (side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 11)  # matplotlib's, which has a ×
    draw.text((4, 6), caption, fill="black")
    for row, (label, clip) in enumerate(clips.items()):
        top = 24 + row * (side + gap)
        draw.text((4, top + side // 2), label, fill="black")
        for column, index in enumerate(np.linspace(0, len(clip) - 1, FRAMES).round().astype(int)):
            image = Image.fromarray(clip[index]).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(image, (margin + column * (side + gap), top))
    with write_atomic(path) as temporary:
        sheet.save(temporary, format="PNG")


def _total_bars(row: Row) -> Any:
    """Distances from the difference of totals to its bounds, (2, 1); None without bounds."""
    low, high = row["Total low"], row["Total high"]
    return None if low is None else np.abs([[row[TOTAL] - low], [high - row[TOTAL]]])


def _velocity_bars(row: Row) -> Any:
    value = row["velocity error"]
    return np.array([[value - row["velocity low"]], [row["velocity high"] - value]])


def _rate_name(rate: Rate | str) -> str:
    return "linear" if rate == "linear" else f"R = {rate}"


def _colors(count: int) -> Sequence[Any]:
    return RATE_COLORS[:count] if count <= len(RATE_COLORS) else colormaps["tab10"].colors[:count]  # type: ignore[attr-defined]


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8)


def _save(figure: Figure, path: Path) -> None:
    with write_atomic(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
