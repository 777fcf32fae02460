"""`report.html`: what a run gained and lost, in one file that needs nothing else."""

import base64
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from ..errors import RunError
from ..files import read_json, read_jsonl, write_text
from .figures import curve_figure, errors_figure, pareto_figure

VARIANTS = {
    "teacher": "teacher (softmax)",
    "distilled": "hybrid, distilled only",
    "hybrid": "hybrid, fine-tuned",
}
"""Folders of videos in a run, in the order in which they are shown."""


def build_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of the run folder `run` to `output` (default: `run/report.html`) and return its path.

    Sections appear for what the run holds: a run that has only been distilled gets a report of its errors.

    Raises:
        RunError: `run` is no run folder.
    """
    run = Path(run)
    if not (run / "config.json").exists():
        raise RunError(f"{run} holds no config.json, so it is no run folder")
    output = Path(output) if output is not None else run / "report.html"
    config = read_json(run / "config.json")
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
        facts.append({"value": f"{100 * chosen['cost']:.1f} %", "label": f"of the blocks' {unit} remain"})
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
            {"label": label, "src": _data_url(run / "videos" / variant / row["file"])}
            for variant, label in VARIANTS.items()
            if (run / "videos" / variant / row["file"]).exists()
        ]
        samples.append({"prompt": row["prompt"], "seed": row["seed"], "videos": videos})
    return [sample for sample in samples if sample["videos"]]


def _data_url(path: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def _sections(run: Path, stages: dict[str, Any]) -> list[dict[str, Any] | None]:
    return [
        _scores(run),
        _cost(run),
        _errors(run, stages),
        _pareto(run),
        _distillation_losses(run),
        _finetuning_losses(run),
        _times(stages),
    ]


def _section(title: str, *texts: str, figure: str = "", table: Any = None) -> dict[str, Any]:
    return {"title": title, "texts": texts, "figure": figure, "table": table}


def _scores(run: Path) -> dict[str, Any] | None:
    if not (run / "scores.json").exists():
        return None
    scores = read_json(run / "scores.json")
    dimensions = list(next(iter(scores["variants"].values())))
    rows = [
        [dimension.replace("_", " "), *(f"{100 * row[dimension]:.1f}" for row in scores["variants"].values())]
        for dimension in dimensions
    ]
    head = ["% on the videos above", *(VARIANTS[variant] for variant in scores["variants"])]
    return _section(
        "Scores of the exact judge",
        f"Means over {scores['videos']} videos of each model, those shown above: too few for small differences. "
        "The judge reads shapes, colours, motion and relations back from the pixels and compares with the caption.",
        table={"head": head, "rows": rows},
    )


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
            cells.append({"value": value} if str(chosen.get(block)) == rate else value)
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
        f"{100 * selection['budget']:.0f} % of the all-softmax {selection['unit']}; the choice uses "
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
