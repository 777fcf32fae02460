"""The page of an experiment: its tables and figures in Markdown, and a CSV, from the rows of all seeds."""

import csv
import io
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from ..files import write_text
from . import figures, tables
from .plans import Experiment
from .records import Item, Records, Row
from .trial import Scale

FINDINGS = "findings.toml"
"""Experiment → two sentences of what it shows, written by people who have read it."""


def summarise(name: str, plan: Experiment, records: Records) -> Path | None:
    """Write NAME.md, NAME.csv and figures beside the rows; return the page, or None while a result is missing."""
    folder, seeds = records.folder, records.scale.seeds
    banks = {label: _rows(records, [Item("bank", seed, maps) for seed in seeds]) for label, maps in plan.banks.items()}
    trials = {label: _rows(records, [Item("trial", s, trial) for s in seeds]) for label, trial in plan.trials.items()}
    lengths = {
        label: {
            frames: _rows(records, [Item("lengths", s, maps, frames) for s in seeds])
            for frames in records.scale.lengths
        }
        for label, maps in (plan.banks if plan.lengths else {}).items()
    }
    teacher = _rows(records, [Item("teacher", seed) for seed in seeds]) if trials else []
    every = [*banks.values(), *trials.values(), *(rows for found in lengths.values() for rows in found.values())]
    if not all([*every, *([teacher] if trials else [])]):
        return None
    lines, table = [f"# {plan.title}", ""], []
    if banks:
        table += tables.error_rows(banks, lengths, dead=plan.dead)
        lines += [*_markdown(tables.readable(table)), *_markdown(tables.bank_pairs(plan, banks))]
        figures.errors(folder / f"{name}-errors.svg", banks)
        lines += [f"![errors]({name}-errors.svg)", ""]
    if trials:
        scored = tables.trial_rows(plan, trials, teacher)
        table += scored
        lines += [*_markdown(tables.readable(scored)), *_markdown(tables.trial_pairs(plan, trials))]
        figures.scores(folder / f"{name}.svg", plan, scored)
        lines += [f"![scores]({name}.svg)", ""]
        if plan.extra == "correlations":
            found = tables.correlations(trials)
            table += found
            lines += ["Rank correlation (Spearman) over the trials of each seed:", "", *_markdown(found)]
        if plan.extra == "grid":
            lines += ["Total score, and the cost of one φ:", "", *_markdown(tables.grid(plan, scored))]
    if plan.frames:
        shown = {"teacher": None, **{label: plan.trials[label] for label in plan.frames}}
        clips = {label: records.clip(trial, seeds[0], 0) for label, trial in shown.items()}
        figures.frames(folder / f"{name}-frames.png", teacher[0]["clips"][0]["caption"], clips)
        lines += [f"![frames]({name}-frames.png)", ""]
    lines += [_provenance(name, records.scale, [row for rows in [*every, teacher] for row in rows]), ""]
    lines += [finding(name), ""]
    _write_csv(folder / f"{name}.csv", table)
    write_text(folder / f"{name}.md", "\n".join(lines))
    return folder / f"{name}.md"


def finding(name: str) -> str:
    """What an experiment shows, in two sentences."""
    text = tomllib.loads((files("attention_surgery.experiments") / FINDINGS).read_text(encoding="utf-8")).get(name, "")
    return " ".join(text.split()) or "Not yet interpreted."


def _rows(records: Records, items: Sequence[Item]) -> list[Row]:
    """The rows of all seeds; none while one is missing."""
    found = [row for item in items if (row := records.find(item)) is not None]
    return found if len(found) == len(items) else []


def _provenance(name: str, scale: Scale, rows: Sequence[Row]) -> str:
    minutes = sum(row["seconds"] for row in rows) / 60
    devices = ", ".join(sorted({row["device"] for row in rows}))
    versions = ", ".join(sorted({f"{part} {v}" for row in rows for part, v in row["versions"].items()}))
    quick = "" if scale.captions > 2 else " --quick"
    return (
        f"`attention-surgery experiment {name}{quick}` on {devices}; {versions}; {minutes:.0f} minutes of one process "
        f"for these rows. Seeds {', '.join(map(str, scale.seeds))} with {scale.captions} captions each. Intervals are "
        "95 %: of scores over captions (paired bootstrap), of distillation errors and of differences of velocity "
        "errors over seeds (t); a velocity error has its range over the seeds."
    )


def _markdown(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """A table and an empty line; nothing for no rows."""
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return [*lines, *("| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows), ""]


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_text(path, text.getvalue())
