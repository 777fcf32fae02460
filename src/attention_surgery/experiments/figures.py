"""Figures of the experiments, drawn from their rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from ..files import write_atomic
from ..generation import read_video
from ..report.figures import INK, MUTED, RATE_COLORS
from .laboratory import Laboratory
from .trial import Trial

FRAMES = 4


def errors(path: Path, banks: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Mean error of every block, one panel per rate, one line per maps; bars span the seeds."""
    rates = list(dict.fromkeys(rate for rows in banks.values() for rate in rows[0]["errors"]["0"]))
    figure = Figure(figsize=(2.6 * len(rates) + 1.4, 2.8), layout="constrained")
    for axes, rate in zip(figure.subplots(1, len(rates), sharey=True, squeeze=False)[0], rates, strict=True):
        for color, (label, rows) in zip(RATE_COLORS, banks.items(), strict=False):
            if rate in rows[0]["errors"]["0"]:
                values = np.array([[row["errors"][block][rate] for block in row["errors"]] for row in rows])
                mean = values.mean(0)
                spread = np.abs(np.stack([values.min(0), values.max(0)]) - mean)
                axes.errorbar(range(len(mean)), mean, yerr=spread, fmt="o-", ms=3, lw=1.2, color=color, label=label)
        axes.set_title("linear" if rate == "linear" else f"R = {rate}", fontsize=9)
        axes.set_xlabel("block", fontsize=8)
        axes.set_ylim(bottom=0)
        _tidy(axes)
    figure.axes[0].set_ylabel("relative L1 error", fontsize=8)
    if len(banks) > 1:
        figure.axes[-1].legend(frameon=False, fontsize=8)
    _save(figure, path)


def scores(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Total score and velocity error of every trial, against the FLOPs that remain."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row, color in zip(rows, _colors(rows), strict=True):
        x = row["remaining FLOPs %"]
        base = row["Total"] - row["Total - teacher"]
        low, high = row["Total low"], row["Total high"]
        bounds = None if low is None else [[row["Total"] - base - low], [base + high - row["Total"]]]
        left.errorbar([x], [row["Total"]], yerr=bounds, fmt="o", ms=4, lw=1, color=color, label=row["trial"])
        velocity = row["velocity error"]
        span = [[velocity - row["velocity low"]], [row["velocity high"] - velocity]]
        right.errorbar([x], [velocity], yerr=span, fmt="o", ms=4, lw=1, color=color, label=row["trial"])
    left.axhline(base, color=MUTED, lw=1, ls="--")
    left.annotate(
        "teacher", (1, base), xycoords=("axes fraction", "data"), fontsize=8, color=MUTED, va="bottom", ha="right"
    )
    left.set_ylabel("total score, %", fontsize=8)
    right.set_ylabel("velocity error", fontsize=8)
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("remaining FLOPs of the blocks, %", fontsize=8)
        _tidy(axes)
    figure.legend(*right.get_legend_handles_labels(), frameon=False, fontsize=7, loc="outside right center")
    _save(figure, path)


def frames(path: Path, laboratory: Laboratory, shown: Mapping[str, Trial | None]) -> None:
    """The same caption and noise through every model: a row each, frames at equal distances."""
    clips = {label: read_video(laboratory.clip(trial, 0)) for label, trial in shown.items()}
    side, gap, margin = 128, 4, 170
    sheet = Image.new("RGB", (margin + FRAMES * (side + gap), 24 + len(clips) * (side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 6), laboratory.captions[0], fill="black")
    for row, (label, clip) in enumerate(clips.items()):
        top = 24 + row * (side + gap)
        draw.text((4, top + side // 2), label, fill="black")
        for column, index in enumerate(np.linspace(0, len(clip) - 1, FRAMES).round().astype(int)):
            image = Image.fromarray(clip[index]).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(image, (margin + column * (side + gap), top))
    with write_atomic(path) as temporary:
        sheet.save(temporary, format="PNG")


def _colors(rows: Sequence[dict[str, Any]]) -> list[Any]:
    import matplotlib

    return [matplotlib.colormaps["turbo"](0.05 + 0.9 * i / max(1, len(rows) - 1)) for i in range(len(rows))]


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8)


def _save(figure: Figure, path: Path) -> None:
    with write_atomic(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
