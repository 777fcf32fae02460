"""What an evaluation found: as Markdown for people, JSON for programs, CSV for tables."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..files import read_json, write_json, write_text
from .paired import Difference

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """Two models on one suite.

    Args:
        suite: its title.
        teacher, student: what the two models are called.
        rows: dimensions, groups, total.
        confidence: of the intervals.
        settings: what the videos were made with, and how many there are.
        notes: sentences that a reader must know, such as videos that a tool left out.
    """

    suite: str
    teacher: str
    student: str
    rows: tuple[Difference, ...]
    confidence: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EvaluationReport":
        """The inverse of `to_dict`. EvaluationError for a report of another version."""
        if values.get("format") != FORMAT:
            raise EvaluationError(f"an evaluation report of format {values.get('format')!r}; expected {FORMAT}")
        rows = tuple(_row(row) for row in values["rows"])
        rest = {key: value for key, value in values.items() if key not in ("format", "rows", "notes")}
        return cls(**rest, rows=rows, notes=tuple(values["notes"]))

    def to_markdown(self) -> str:
        """A table with one row per dimension, group and total, and the notes."""
        lines = [
            f"# {self.suite}: {_cell(self.student)} against {_cell(self.teacher)}",
            "",
            f"| | {_cell(self.teacher)} | {_cell(self.student)} | Difference | {self.confidence:.0%} interval "
            "| Prompts |",
            "|---|---:|---:|---:|---|---:|",
        ]
        for row in self.rows:
            strong = "**" if row.kind != "dimension" else ""
            cells = (
                row.name.replace("_", " "),
                f"{row.teacher:.2f}",
                f"{row.student:.2f}",
                f"{row.difference:+.2f}",
                f"{row.interval[0]:+.2f} to {row.interval[1]:+.2f}" if row.interval else "–",
                "" if row.prompts is None else str(row.prompts),
            )
            lines.append("| " + " | ".join(f"{strong}{cell}{strong}" if cell else "" for cell in cells) + " |")
        lines += [
            "",
            "Scores in %, differences in percentage points. The intervals are bootstrap intervals over prompts, one "
            "row at a time: they are not adjusted for the number of rows.",
        ]
        if self.settings:
            lines += ["", *(f"- {name}: {_cell(str(value))}" for name, value in self.settings.items())]
        if self.notes:
            lines += ["", *(f"- {_cell(note)}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def to_csv(self) -> str:
        """The rows, at full precision."""
        names = ("name", "kind", "teacher", "student", "difference", "low", "high")
        names += ("prompts", "teacher_videos", "student_videos")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        for row in self.rows:
            low, high = row.interval or ("", "")
            videos = row.videos or ("", "")
            prompts = "" if row.prompts is None else row.prompts
            writer.writerow((row.name, row.kind, row.teacher, row.student, row.difference, low, high, prompts, *videos))
        return text.getvalue()

    def write(self, folder: str | Path) -> None:
        """Write `report.md`, `report.json` and `report.csv`, each atomically."""
        folder = Path(folder)
        write_text(folder / "report.md", self.to_markdown())
        write_text(folder / "report.csv", self.to_csv())
        write_json(folder / "report.json", self.to_dict())

    def __str__(self) -> str:
        return self.to_markdown()


def read_report(path: str | Path) -> EvaluationReport:
    """Read `report.json`, by its path or its folder's. EvaluationError if it is none."""
    path = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
    try:
        values = read_json(path)
    except (OSError, json.JSONDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read as an evaluation report: {error}") from error
    if not isinstance(values, dict):
        raise EvaluationError(f"{path} is no evaluation report")
    return EvaluationReport.from_dict(values)


def _row(values: Mapping[str, Any]) -> Difference:
    pairs = {name: None if values[name] is None else tuple(values[name]) for name in ("interval", "videos")}
    return Difference(**{**values, **pairs})


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
