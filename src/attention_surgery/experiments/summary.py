"""Tables of an experiment: one CSV and one Markdown page, from the rows of all seeds."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ..evaluation.paired import Difference
from ..evaluation.shapes_suite import compare_shapes
from ..files import write_text
from . import figures
from .laboratory import Laboratory
from .plans import Experiment
from .trial import Scale

SHOWN = ("Total", "Quality", "Semantic", "dynamic_degree")


def summarise(name: str, plan: Experiment, folder: Path, scale: Scale) -> Path | None:
    """Write `folder/NAME.md`, `NAME.csv` and figures; return the page, or None while a result is missing."""
    laboratories = [Laboratory(folder, scale, seed) for seed in scale.seeds]
    teacher = [laboratory.find(None) for laboratory in laboratories]
    rows: dict[str, list[dict[str, Any]]] = {}
    for label, what in [*plan.trials.items(), *((f"maps {label}", maps) for label, maps in plan.banks.items())]:
        found = [laboratory.find(what) for laboratory in laboratories]
        if None in found or None in teacher:
            return None
        rows[label] = [row for row in found if row is not None]
    trials = {label: rows[label] for label in plan.trials}
    banks = {label: rows[f"maps {label}"] for label in plan.banks}
    lengths = _lengths(plan, laboratories) if plan.lengths else {}
    if plan.lengths and not lengths:
        return None
    lines = [f"# {plan.title}", ""]
    table: list[dict[str, Any]] = []
    if banks:
        table += error_rows(banks, lengths)
        lines += [*_markdown(_readable(table)), "", *_markdown(bank_pairs(plan, banks)), ""]
        figures.errors(folder / f"{name}-errors.svg", banks)
        lines += [f"![errors]({name}-errors.svg)", ""]
    if trials:
        scored = trial_rows(trials, [row for row in teacher if row is not None])
        table += scored
        lines += [*_markdown(_readable(scored)), ""]
        if plan.pairs:
            lines += [*_markdown(trial_pairs(plan, trials)), ""]
        figures.scores(folder / f"{name}.svg", scored)
        lines += [f"![scores]({name}.svg)", ""]
    if name == "figure5":
        correlated = correlations(trials)
        table += correlated
        lines += ["Rank correlation (Spearman) over the trials of each seed:", "", *_markdown(correlated), ""]
    if plan.frames:
        shown = {"teacher": None, **{label: plan.trials[label] for label in plan.frames}}
        figures.frames(folder / f"{name}-frames.png", laboratories[0], shown)
        lines += [f"![frames]({name}-frames.png)", ""]
    hours = sum(row["seconds"] for found in rows.values() for row in found) / 3600
    lines += [
        f"{len(scale.seeds)} seeds of {scale.captions} captions; {hours:.2f} processor hours for these rows. Intervals "
        "are 95 %: over captions (bootstrap, paired) for scores, over seeds (t) for errors.",
        "",
    ]
    _write_csv(folder / f"{name}.csv", table)
    write_text(folder / f"{name}.md", "\n".join(lines))
    return folder / f"{name}.md"


def error_rows(banks: Mapping[str, Sequence[dict[str, Any]]], lengths: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mean e_ir over the blocks, by maps, length and rate."""
    rows = []
    for label, found in banks.items():
        for frames, per_seed in {"": found, **lengths.get(label, {})}.items():
            for rate in per_seed[0]["errors"]["0"]:
                values = [_mean_error(row, rate) for row in per_seed]
                low, high = _t_interval(values) or (None, None)
                rows.append(
                    {"maps": label, "frames": frames, "rate": rate, "error": np.mean(values), "low": low, "high": high}
                )
    return rows


def bank_pairs(plan: Experiment, banks: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Differences of the mean error between two maps at the rates that both have, paired by seed."""
    rows = []
    for one, two in plan.pairs:
        for rate in banks[one][0]["errors"]["0"]:
            if rate in banks[two][0]["errors"]["0"]:
                pairs = list(zip(banks[one], banks[two], strict=True))
                differences = [_mean_error(b, rate) - _mean_error(a, rate) for a, b in pairs]
                blocks = [b["errors"][i][rate] < a["errors"][i][rate] for a, b in pairs for i in a["errors"]]
                rows.append(
                    {
                        "maps": f"{two} - {one}",
                        "rate": rate,
                        "difference": f"{np.mean(differences):+.4f}",
                        "interval": _bracket(_t_interval(differences), "+.4f"),
                        "lower in": f"{sum(blocks)} of {len(blocks)} blocks × seeds",
                    }
                )
    return rows


def trial_rows(
    trials: Mapping[str, Sequence[dict[str, Any]]], teacher: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Cost, errors and scores of every trial; differences are against the teacher's clips of the same captions."""
    rows = []
    for label, found in trials.items():
        row: dict[str, Any] = {
            "trial": label,
            "remaining FLOPs %": 100 * np.mean([r["remaining"] for r in found]),
            "summed error": np.mean([r["error"] for r in found]),
            "velocity error": np.mean([r["velocity_error"] for r in found]),
            "velocity low": min(r["velocity_error"] for r in found),
            "velocity high": max(r["velocity_error"] for r in found),
        }
        for score in _compare(teacher, found):
            if score.name in SHOWN:
                row |= {
                    score.name: score.student,
                    f"{score.name} - teacher": score.difference,
                    f"{score.name} low": score.interval[0] if score.interval else None,
                    f"{score.name} high": score.interval[1] if score.interval else None,
                }
        rows.append(row)
    return rows


def trial_pairs(plan: Experiment, trials: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Differences between two trials, second minus first."""
    rows = []
    for one, two in plan.pairs:
        velocity = [b["velocity_error"] - a["velocity_error"] for a, b in zip(trials[one], trials[two], strict=True)]
        row = {
            "pair": f"{two} - {one}",
            "velocity error": f"{np.mean(velocity):+.4f} {_bracket(_t_interval(velocity), '+.4f')}",
        }
        for score in _compare(trials[one], trials[two]):
            if score.name in SHOWN:
                row[score.name] = f"{score.difference:+.1f} {_bracket(score.interval, '+.1f')}"
        rows.append(row)
    return rows


def correlations(trials: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Spearman's ρ of the summed distillation error with what comes out in the end, mean and range over seeds."""
    rows = []
    for outcome in ("velocity_error", "total", "semantic"):
        values = []
        for per_seed in zip(*trials.values(), strict=True):
            ends = [
                row[outcome] if outcome in row else np.mean([clip["scores"][outcome] for clip in row["clips"]])
                for row in per_seed
            ]
            values.append(float(stats.spearmanr([row["error"] for row in per_seed], ends).statistic))
        rows.append(
            {
                "summed error with": outcome.replace("_", " "),
                "Spearman": f"{np.mean(values):+.2f}",
                "per seed": " ".join(f"{value:+.2f}" for value in values),
            }
        )
    return rows


def _lengths(plan: Experiment, laboratories: Sequence[Laboratory]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """label → frames → rows of all seeds; empty while one is missing."""
    result: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for label, maps in plan.banks.items():
        for frames in laboratories[0].scale.lengths:
            found = [laboratory.find_errors_at(maps, frames) for laboratory in laboratories]
            if None in found:
                return {}
            result.setdefault(label, {})[frames] = [row for row in found if row is not None]
    return result


def _compare(one: Sequence[dict[str, Any]], two: Sequence[dict[str, Any]]) -> list[Difference]:
    return compare_shapes(_values(one), _values(two))


def _values(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """dimension → caption of a seed → value."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for number, clip in enumerate(row["clips"]):
            for name, value in clip["scores"].items():
                values.setdefault(name, {})[f"{row['seed']}/{number} {clip['caption']}"] = [value]
    return values


def _mean_error(row: dict[str, Any], rate: str) -> float:
    return float(np.mean([errors[rate] for errors in row["errors"].values()]))


def _t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean over seeds; None for a single one."""
    if len(values) < 2:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _bracket(interval: tuple[float, float] | None, form: str) -> str:
    return "" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def _readable(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows with their bounds folded into brackets, for people."""
    readable = []
    for row in rows:
        shown: dict[str, str] = {}
        for name, value in row.items():
            if name.endswith(("low", "high")):
                continue
            shown[name] = _number(value)
            stem = name.removesuffix(" error").removesuffix(" - teacher")
            bounds = (row.get(f"{stem} low", row.get("low")), row.get(f"{stem} high", row.get("high")))
            difference = name.endswith(" - teacher") or name in ("velocity error", "error")
            if difference and None not in bounds:
                shown[name] += f" [{_number(bounds[0])}, {_number(bounds[1])}]"
        readable.append(shown)
    return readable


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1 else f"{value:.1f}"
    return "" if value is None else str(value)


def _markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return lines + ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_text(path, text.getvalue())
