"""Rows of the tables: what trials and banks give, over seeds, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ..evaluation.paired import Difference
from ..evaluation.shapes_suite import compare_shapes
from ..teacher.config import TeacherConfig
from .plans import Experiment
from .records import Row
from .trial import Trial

Found = Mapping[str, Sequence[Row]]
"""label → the rows of all seeds."""

SHOWN = ("Total", "Quality", "Semantic", "dynamic_degree")
TINY = {"heads": TeacherConfig.heads, "head_dim": TeacherConfig.width // TeacherConfig.heads, "tokens": 576}
WAN = {"heads": 12, "head_dim": 128, "tokens": 12_600}  # Wan2.1 1.3B at 81×320×480, which Table 6 counts


def error_rows(banks: Found, lengths: Mapping[str, Mapping[int, Sequence[Row]]], *, dead: bool) -> list[Row]:
    """Mean e_ir over the blocks, by maps, length and rate."""
    rows = []
    for label, found in banks.items():
        for frames, per_seed in {"": found, **lengths.get(label, {})}.items():
            for rate in per_seed[0]["errors"]["0"]:
                values = [mean_error(row, rate) for row in per_seed]
                low, high = t_interval(values) or (None, None)
                row = {"maps": label, "frames": frames, "rate": rate}
                row |= {"error": float(np.mean(values)), "low": low, "high": high}
                if dead:
                    row["dead features %"] = 100 * float(np.mean([r["dead"][rate] for r in per_seed]))
                rows.append(row if lengths else {name: value for name, value in row.items() if name != "frames"})
    return rows


def bank_pairs(plan: Experiment, banks: Found) -> list[Row]:
    """Differences of the mean error between two maps at the rates that both have, paired by seed."""
    rows = []
    for one, two in plan.pairs:
        if one not in banks:
            continue
        for rate in banks[one][0]["errors"]["0"]:
            if rate in banks[two][0]["errors"]["0"]:
                pairs = list(zip(banks[one], banks[two], strict=True))
                differences = [mean_error(b, rate) - mean_error(a, rate) for a, b in pairs]
                blocks = [b["errors"][i][rate] < a["errors"][i][rate] for a, b in pairs for i in a["errors"]]
                rows.append(
                    {
                        "maps": f"{two} − {one}",
                        "rate": rate,
                        "difference": f"{np.mean(differences):+.4f}",
                        "interval": bracket(t_interval(differences), "+.4f"),
                        "lower in": f"{sum(blocks)} of {len(blocks)} blocks × seeds",
                    }
                )
    return rows


def trial_rows(plan: Experiment, trials: Found, teacher: Sequence[Row]) -> list[Row]:
    """Cost, errors and scores of every trial; differences are against the teacher's clips of the same captions."""
    rows = []
    for label, found in trials.items():
        velocity = [row["velocity_error"] for row in found]
        row: Row = {
            "trial": label,
            "remaining FLOPs %": 100 * float(np.mean([row["remaining"] for row in found])),
            "summed error": float(np.mean([row["error"] for row in found])),
            "velocity error": float(np.mean(velocity)),
            "velocity low": min(velocity),
            "velocity high": max(velocity),
        }
        if all("heldout_loss" in r for r in found):
            row["held-out loss"] = float(np.mean([r["heldout_loss"][1] for r in found]))
        for score in compare_rows(teacher, found):
            if score.name in SHOWN + plan.shown:
                row |= {
                    score.name: score.student,
                    f"{score.name} − teacher": score.difference,
                    f"{score.name} low": score.interval[0] if score.interval else None,
                    f"{score.name} high": score.interval[1] if score.interval else None,
                }
        rows.append(row)
    return rows


def trial_pairs(plan: Experiment, trials: Found) -> list[Row]:
    """Differences between two trials, second minus first."""
    rows = []
    for one, two in plan.pairs:
        if one not in trials:
            continue
        velocity = [b["velocity_error"] - a["velocity_error"] for a, b in zip(trials[one], trials[two], strict=True)]
        row = {
            "pair": f"{two} − {one}",
            "velocity error": f"{np.mean(velocity):+.4f} {bracket(t_interval(velocity), '+.4f')}",
        }
        for score in compare_rows(trials[one], trials[two]):
            if score.name in SHOWN + plan.shown:
                row[score.name] = f"{score.difference:+.1f} {bracket(score.interval, '+.1f')}"
        rows.append(row)
    return rows


def correlations(trials: Found) -> list[Row]:
    """Spearman's ρ of the summed distillation error with what comes out in the end, mean and each seed's."""
    rows = []
    for outcome in ("velocity_error", "total", "semantic", "quality"):
        values = []
        for per_seed in zip(*trials.values(), strict=True):
            ends = [
                row[outcome] if outcome in row else np.mean([clip["scores"][outcome] for clip in row["clips"]])
                for row in per_seed
            ]
            found: Any = stats.spearmanr([row["error"] for row in per_seed], ends)
            values.append(float(found.statistic))
        rows.append(
            {
                "summed error with": outcome.replace("_", " "),
                "Spearman": f"{np.mean(values):+.2f}",
                "per seed": " ".join(f"{value:+.2f}" for value in values),
            }
        )
    return rows


def grid(plan: Experiment, scored: Sequence[Row]) -> list[Row]:
    """Table 6 as the paper prints it: totals by P and L and by blocks, and what one φ costs, here and in Wan2.1 1.3B.

    FLOPs are of the products and the biases of one φ on all tokens.
    """
    rows: dict[tuple[int, int], Row] = {}
    for row in scored:
        trial: Trial = plan.trials[row["trial"]]
        size = (trial.maps.degree, trial.maps.layers)
        (params, flops), (wan_params, wan_flops) = (map_cost(*size, **model) for model in (TINY, WAN))
        rows.setdefault(size, {"P": size[0], "L": size[1]})[trial.name] = f"{row['Total']:.1f}"
        rows[size] |= {
            "parameters, K": f"{params / 1e3:.1f}",
            "FLOPs, M": f"{flops / 1e6:.1f}",
            "parameters in Wan, M": f"{wan_params / 1e6:.2f}",
            "FLOPs in Wan, G": f"{wan_flops / 1e9:.0f}",
        }
    costs = ("parameters, K", "FLOPs, M", "parameters in Wan, M", "FLOPs in Wan, G")
    return [
        {name: value for name, value in row.items() if name not in costs} | {name: row[name] for name in costs}
        for row in rows.values()
    ]


def map_cost(degree: int, layers: int, *, heads: int, head_dim: int, tokens: int) -> tuple[int, int]:
    """Parameters of one φ, and FLOPs of its products and biases on `tokens` tokens."""
    features = degree * head_dim
    weights = heads * (head_dim * features + (layers - 1) * features**2)
    biases = heads * layers * features
    return weights + biases, (2 * weights + biases) * tokens


def compare_rows(one: Sequence[Row], two: Sequence[Row]) -> list[Difference]:
    """Differences of all dimensions between two trials' clips, paired by seed and caption."""
    return compare_shapes(_values(one), _values(two), resamples=4_000)


def _values(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """dimension → caption of a seed → value."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for number, clip in enumerate(row["clips"]):
            for name, value in clip["scores"].items():
                values.setdefault(name, {})[f"{row['seed']}/{number} {clip['caption']}"] = [value]
    return values


def mean_error(row: Row, rate: str) -> float:
    """Over the blocks."""
    return float(np.mean([errors[rate] for errors in row["errors"].values()]))


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean over seeds; None for a single one."""
    if len(values) < 2:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def bracket(interval: tuple[float, float] | None, form: str) -> str:
    """An interval in words; empty for None."""
    return "" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def readable(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Rows with their bounds folded into brackets, for people."""
    shown = []
    for row in rows:
        cells: dict[str, str] = {}
        for name, value in row.items():
            if name.endswith((" low", " high")) or name in ("low", "high"):
                continue
            cells[name] = _number(value)
            stem = name.removesuffix(" error").removesuffix(" − teacher")
            bounds = (row.get(f"{stem} low", row.get("low")), row.get(f"{stem} high", row.get("high")))
            bounded = name.endswith(" − teacher") or name in ("velocity error", "error")
            if bounded and None not in bounds:
                cells[name] += f" [{_number(bounds[0])}, {_number(bounds[1])}]"
        shown.append(cells)
    return shown


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1 else f"{value:.1f}"
    return "" if value is None else str(value)
