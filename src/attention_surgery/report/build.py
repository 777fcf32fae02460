"""`report.html`: what a run gained and lost, in one file that needs nothing else."""

import base64
import csv
import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from ..errors import RunError
from ..evaluation import read_report
from ..files import read_json, read_jsonl, write_text
from ..generation import read_video
from .figures import curve_figure, errors_figure, pareto_figure

VARIANTS = {
    "teacher": "teacher (softmax)",
    "distilled": "hybrid, distilled only",
    "hybrid": "hybrid, fine-tuned",
}
"""Folders of videos in a run, in the order in which they are shown."""

SUMMARIES = ("quality", "semantic", "total")
UNITS = {"flops": "FLOPs"}
STRIP_FRAMES, STRIP_HEIGHT = 6, 112


def build_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of the run folder `run` to `output` (default: `run/report.html`) and return its path.

    Sections appear for what the run holds: a run that has only been distilled gets a report of its errors; what
    `evaluate --output RUN/evaluation…` and `study report --output-dir RUN/study…` left there is shown too.

    Raises:
        RunError: `run` is no run folder.
    """
    run = Path(run)
    if not (run / "config.json").exists():
        raise RunError(f"{run} holds no config.json, so it is no run folder")
    output = Path(output) if output is not None else run / "report.html"
    config = read_json(run / "config.json")
    if not isinstance(config, dict) or not {"base", "generate"} <= config.keys():
        raise RunError(f"{run}/config.json is not that of a run")
    stages = {row["stage"]: row for row in read_jsonl(run / "stages.jsonl")} if (run / "stages.jsonl").exists() else {}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(
        (files("attention_surgery.report") / "report.html.j2").read_text(encoding="utf-8")
    )
    html = template.render(
        title=f"Attention surgery on {config['base']}",
        subtitle=_subtitle(config, stages),
        facts=_facts(run, stages),
        samples=_samples(run),
        sections=[section for section in _sections(run, stages) if section],
        settings=json.dumps(config, indent=2),
    )
    write_text(output, html)
    return output


def _subtitle(config: dict[str, Any], stages: dict[str, Any]) -> str:
    shape = config["generate"]
    size = f"{shape['num_frames']}×{shape['height']}×{shape['width']}"
    versions = stages.get("profile", {}).get("versions", {})
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{size} pixels, {shape['num_inference_steps']} steps, guidance {shape['guidance_scale']}. {software}"


def _facts(run: Path, stages: dict[str, Any]) -> list[dict[str, str]]:
    facts = []
    if "select" in stages:
        chosen = stages["select"]
        converted = sum(rate != 1 for rate in chosen["rates"].values())
        unit = read_json(run / "selection.json")["unit"]
        remaining = f"of the blocks' {UNITS.get(unit, unit)} remain"
        facts.append({"value": f"{100 * chosen['cost']:.1f} %", "label": remaining})
        facts.append({"value": f"{converted} of {len(chosen['rates'])}", "label": "blocks converted"})
    if "profile" in stages:
        share = stages["profile"]["attention_share"]
        facts.append({"value": f"{100 * share:.1f} %", "label": "of the dense blocks' FLOPs are self-attention"})
    scores = run / "scores.json"
    if scores.exists():
        for variant, row in read_json(scores)["variants"].items():
            facts.append({"value": f"{100 * row['semantic']:.1f} %", "label": f"semantic score, {VARIANTS[variant]}"})
    seconds = sum(row["seconds"] for row in stages.values())
    if seconds:
        facts.append({"value": f"{seconds / 60:.1f} min", "label": "for all stages"})
    return facts


def _samples(run: Path) -> list[dict[str, Any]]:
    index = run / "videos" / "samples.json"
    if not index.exists():
        return []
    samples = []
    for row in read_json(index):
        videos = [
            {"label": label, "src": _data_url("video/mp4", path.read_bytes()), "strip": _strip(path)}
            for variant, label in VARIANTS.items()
            if (path := run / "videos" / variant / row["file"]).exists()
        ]
        samples.append({"prompt": row["prompt"], "seed": row["seed"], "videos": videos})
    return [sample for sample in samples if sample["videos"]]


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def _strip(path: Path) -> str:
    """A few frames of a video side by side, first and last among them."""
    frames = read_video(path)
    chosen = frames[np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames))).round().astype(int)]
    width = max(1, round(chosen.shape[2] * STRIP_HEIGHT / chosen.shape[1]))
    strip = Image.new("RGB", (len(chosen) * (width + 2) - 2, STRIP_HEIGHT), "white")
    for place, frame in enumerate(chosen):
        strip.paste(Image.fromarray(frame).resize((width, STRIP_HEIGHT)), (place * (width + 2), 0))
    content = io.BytesIO()
    strip.save(content, "JPEG", quality=88)
    return _data_url("image/jpeg", content.getvalue())


def _sections(run: Path, stages: dict[str, Any]) -> list[dict[str, Any] | None]:
    return [
        _scores(run),
        *_evaluations(run),
        *_studies(run),
        _cost(run),
        _errors(run, stages),
        _pareto(run),
        _distillation_losses(run),
        _finetuning_losses(run),
        _times(stages),
    ]


def _section(title: str, *texts: str, figure: str = "", image: str = "", table: Any = None) -> dict[str, Any]:
    return {"title": title, "texts": texts, "figure": figure, "image": image, "table": table}


def _strong(cells: list[str]) -> list[Any]:
    return [{"value": cell, "kind": "strong"} for cell in cells]


def _scores(run: Path) -> dict[str, Any] | None:
    if not (run / "scores.json").exists():
        return None
    scores = read_json(run / "scores.json")
    variants, differences = scores["variants"], scores["difference"]
    names = [name for name in differences if name not in SUMMARIES] + list(SUMMARIES)
    rows = []
    for name in names:
        cells = [name.replace("_", " "), *(f"{100 * row[name]:.1f}" for row in variants.values())]
        cells.append(_with_interval(differences[name]["value"], differences[name]["interval"]))
        rows.append(_strong(cells) if name in SUMMARIES else cells)
    head = ["% on the videos above", *(VARIANTS[variant] for variant in variants), "fine-tuned − teacher, points"]
    return _section(
        "Scores of the exact judge",
        f"Means over {scores['videos']} videos of each model, those shown above: too few for small differences. "
        "The judge reads shapes, colours, motion and relations back from the pixels and compares with the caption. "
        "In brackets: 95 % bootstrap interval over prompts, where at least two have the dimension.",
        table={"head": head, "rows": rows},
    )


def _evaluations(run: Path) -> list[dict[str, Any]]:
    """What `evaluate` found, one section per suite."""
    sections = []
    for file in sorted(run.glob("evaluation*/report.json")):
        report = read_report(file)
        rows = []
        for row in report.rows:
            cells = [
                row.name.replace("_", " "),
                f"{row.teacher:.2f}",
                f"{row.student:.2f}",
                _with_interval(row.difference, row.interval, digits=2),
                "" if row.prompts is None else str(row.prompts),
            ]
            rows.append(cells if row.kind == "dimension" else _strong(cells))
        settings = "; ".join(f"{name}: {value}" for name, value in report.settings.items())
        sections.append(
            _section(
                f"{report.suite}: {report.student} against {report.teacher}",
                f"Scores in %, differences in points with their {report.confidence:.0%} bootstrap interval over "
                f"prompts, one row at a time. {settings}",
                *report.notes,
                table={"head": ["", report.teacher, report.student, "difference", "prompts"], "rows": rows},
            )
        )
    return sections


def _studies(run: Path) -> list[dict[str, Any]]:
    """What raters preferred, in the form of Table 2, one section per study."""
    sections = []
    for file in sorted(run.glob("study*/study.csv")):
        with open(file, newline="", encoding="utf-8") as table:
            lines = list(csv.DictReader(table))
        total = lines[-1]
        rows = []
        for line in lines:
            shares = [f"{100 * float(line[f'{name}_share']):.1f}" for name in ("win", "tie", "loss")]
            low, high = line["net_low"], line["net_high"]
            interval = (100 * float(low), 100 * float(high)) if low else None
            cells = [line["dimension"], *shares, line["votes"], _with_interval(100 * float(line["net"]), interval)]
            rows.append(_strong(cells) if line is total else cells)
        text = file.with_suffix(".md").read_text(encoding="utf-8").partition("## What it shows")[2]
        sections.append(
            _section(
                f"Blind study: {total['ours']} against {total['baseline']}",
                f"{total['votes']} votes by {total['raters']} raters on {total['prompts']} prompts, names, order and "
                f"sides hidden. Net preference: share of votes for {total['ours']} minus that for {total['baseline']}, "
                f"with its {float(total['confidence']):.0%} bootstrap interval over raters and prompts.",
                *(line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")),
                image=_data_url("image/png", file.with_suffix(".png").read_bytes()),
                table={
                    "head": [
                        "prompts",
                        f"{total['ours']} %",
                        "no preference %",
                        f"{total['baseline']} %",
                        "votes",
                        "net, points",
                    ],
                    "rows": rows,
                },
            )
        )
    return sections


def _with_interval(value: float, interval: Any, *, digits: int = 1) -> str:
    value, *bounds = (round(number, digits) + 0.0 for number in (value, *(interval or ())))  # no "-0.0"
    listed = ",\N{NO-BREAK SPACE}".join(f"{bound:+.{digits}f}" for bound in bounds)
    return f"{value:+.{digits}f}" + (f" [{listed}]" if bounds else "")


def _cost(run: Path) -> dict[str, Any] | None:
    if not (run / "profile.json").exists():
        return None
    costs = read_json(run / "profile.json")
    rows = [
        [
            label,
            f"{row['total_flops'] / 1e9:.2f}",
            f"{100 * row['attention_share']:.1f}",
            f"{100 * row['core_share']:.1f}",
        ]
        for label, row in costs["models"].items()
    ]
    head = ["", "GFLOP of all blocks, one forward", "self-attention, % of it", "of which QKᵀ and PV, % of all"]
    return _section(
        "Cost before and after",
        f"{costs['tokens']} tokens. FLOPs of the transformer blocks for one forward of one sample, 2 per multiply-add, "
        "feature maps and linear states included. “Self-attention” counts the QKVO projections and the attention core.",
        table={"head": head, "rows": rows},
    )


def _errors(run: Path, stages: dict[str, Any]) -> dict[str, Any] | None:
    if "distill" not in stages:
        return None
    errors = stages["distill"]["errors"]
    chosen = stages.get("select", {}).get("rates", {})
    rates = list(next(iter(errors.values())))
    rows = []
    for block in sorted(errors, key=int):
        cells: list[Any] = [block]
        for rate in rates:
            value = f"{errors[block][rate]:.4f}"
            cells.append({"value": value, "kind": "chosen"} if str(chosen.get(block)) == rate else value)
        rows.append(cells)
    head = ["block", *("linear" if rate == "linear" else f"R = {rate}" for rate in rates)]
    return _section(
        "Error of each block by rate, after distillation",
        "‖y − ŷ‖₁ / ‖y‖₁ of the attention output on held-out prompts, averaged over denoising steps; softmax has 0. "
        "Chosen rates are ringed, and shaded in the table; a block without a mark keeps softmax.",
        figure=errors_figure(errors, chosen),
        table={"head": head, "rows": rows},
    )


def _pareto(run: Path) -> dict[str, Any] | None:
    if not (run / "selection.json").exists():
        return None
    selection = read_json(run / "selection.json")
    return _section(
        "Choice of rates",
        f"Every point of the black line is the best that any mix of rates can do at its cost. The budget is "
        f"{100 * selection['budget']:.0f} % of the all-softmax {UNITS.get(selection['unit'], selection['unit'])}; the "
        f"choice uses "
        f"{100 * selection['cost']:.1f} %.",
        figure=pareto_figure(selection),
    )


def _distillation_losses(run: Path) -> dict[str, Any] | None:
    logs = sorted((run / "distill").glob("log-*.jsonl"))
    if not logs:
        return None
    curves: dict[str, list[tuple[float, float]]] = {}
    for log in logs:
        for row in read_jsonl(log):
            by_rate: dict[str, list[float]] = {}
            for key, value in row["loss"].items():
                by_rate.setdefault(key.split("/")[1], []).append(value)
            for rate, values in by_rate.items():
                label = "linear" if rate == "linear" else f"R = {rate}"
                curves.setdefault(label, []).append((row["update"], sum(values) / len(values)))
    figure = curve_figure(curves, xlabel="update", ylabel="loss, mean over blocks")
    return _section("Distillation", figure=figure)


def _finetuning_losses(run: Path) -> dict[str, Any] | None:
    log = run / "finetune" / "log.jsonl"
    if not log.exists():
        return None
    rows = read_jsonl(log)
    curves = {
        label: points
        for label, key in {"training loss": "loss", "held-out loss": "heldout_loss"}.items()
        if (points := [(row["step"], row[key]) for row in rows if key in row])
    }
    return _section("Fine-tuning", figure=curve_figure(curves, xlabel="step", ylabel="loss"))


def _times(stages: dict[str, Any]) -> dict[str, Any] | None:
    if not stages:
        return None
    rows = [[name, f"{row['seconds']:.1f}"] for name, row in stages.items()]
    return _section("Time of each stage", table={"head": ["stage", "seconds"], "rows": rows})
