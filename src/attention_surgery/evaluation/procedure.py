"""A whole evaluation: the same prompts and seeds for teacher and student, the judge, the comparison."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..files import digest, read_json, write_json
from ..generation import generate
from .config import EvaluateConfig
from .paired import compare
from .prompts import Prompt, find_info, read_info, read_prompts, select_entries
from .report import EvaluationReport
from .results import collect_results, expected_files, values_by_prompt
from .runner import filter_static, run_official
from .sampling import SamplingConfig, set_scheduler_
from .shapes_suite import Shot, compare_shapes, judge_model, plan_shots, read_values
from .videos import Sampler, Video, check_videos, generate_videos, missing_videos, plan_videos

LoadPipeline = Callable[[], Any]
"""Loads a diffusers pipeline; called only when a video is missing."""

FLICKERING = "temporal_flickering"
BITS_PER_PIXEL = 0.4  # of an H.264 file at the quality that is written; videos differ by several times


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationCost:
    """What an evaluation will take, of both models together.

    Args:
        videos: to be judged, copies under other names not counted.
        missing: of them, not made yet.
        forwards: passes of the transformer to make those, two per step where guidance needs both.
        disk: bytes of all videos, roughly.
    """

    videos: int
    missing: int
    forwards: int
    disk: int

    def __str__(self) -> str:
        return (
            f"evaluate: {self.videos} videos of both models, {self.missing} of them not there yet; "
            f"{self.forwards} transformer forwards, about {self.disk / 2**30:.1f} GiB of disk"
        )


def evaluate(
    config: EvaluateConfig,
    output_dir: str | Path,
    *,
    teacher: LoadPipeline,
    student: LoadPipeline,
    teacher_name: str = "teacher",
    student_name: str = "student",
    rank: int = 0,
    world_size: int = 1,
) -> EvaluationReport | None:
    """Generate what is missing, judge what is not judged, compare, and write `report.md`, `.json` and `.csv`.

    `output_dir` gets one folder per model, with its videos and results, and goes on from where it stands. To share
    the generation out, start `world_size` processes with ranks from 0; they end after their videos. A call without
    them does whatever is left, so it comes last.

    Args:
        config: what to evaluate.
        teacher, student: load the two pipelines, one after the other.
        teacher_name, student_name: of the report. They tell the runs in `output_dir` apart.

    Returns:
        The report; None from one of several processes.

    Raises:
        EvaluationError: missing or broken videos, prompts or results, named.
        RunError: `output_dir` was made with other settings or models.
    """
    output_dir = Path(output_dir)
    work = _prepare(config)
    names = {"teacher": teacher_name, "student": student_name}
    _claim(output_dir, config, work, names)
    sampling, shard = config.resolved_sampling, {"rank": rank, "world_size": world_size}
    for role, load in (("teacher", teacher), ("student", student)):
        sample = partial(_sampler, load, sampling)
        folder = output_dir / role
        options: dict[str, Any] = {"fps": sampling.fps, "batch_size": config.batch_size, **shard}
        if work.shots:
            judge_model(sample, work.shots, folder, **options)
        else:
            generate_videos(sample, work.plan, folder / "videos", **options)
    if world_size > 1:
        return None
    judged = [_judge(config, work, output_dir / role) for role in names]
    rows, notes = _compare(config, work, *judged)
    report = EvaluationReport(
        suite="Shapes" if work.shots else config.benchmark.title,
        teacher=teacher_name,
        student=student_name,
        rows=tuple(rows),
        confidence=config.confidence,
        settings=_describe(config, work),
        notes=tuple(notes),
    )
    report.write(output_dir)
    return report


def estimate(config: EvaluateConfig, output_dir: str | Path | None = None) -> EvaluationCost:
    """What `evaluate` will take, given what `output_dir` has already. Nothing is loaded or written."""
    work, sampling = _prepare(config), config.resolved_sampling
    per_model = len(work.shots) or len(work.plan)
    missing = 2 * per_model
    if output_dir is not None and not work.shots:
        folders = [Path(output_dir) / role / "videos" for role in ("teacher", "student")]
        missing = sum(bool(missing_videos([video], folder)) for folder in folders for video in work.plan)
    elif output_dir is not None:
        folders = [Path(output_dir) / role / "videos" for role in ("teacher", "student")]
        missing = sum(not (folder / f"{shot.key}.mp4").exists() for folder in folders for shot in work.shots)
    files = 2 * (len(work.shots) or sum(len(video.files) for video in work.plan))
    pixels = sampling.num_frames * sampling.height * sampling.width
    return EvaluationCost(
        videos=2 * per_model,
        missing=missing,
        forwards=missing * sampling.num_inference_steps * (2 if sampling.guidance_scale > 1 else 1),
        disk=int(files * pixels * BITS_PER_PIXEL / 8),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """What there is to do: either the shots of the small world, or a benchmark's prompts, entries and videos."""

    shots: list[Shot] = dataclasses.field(default_factory=list)
    entries: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    prompts: list[Prompt] = dataclasses.field(default_factory=list)
    plan: list[Video] = dataclasses.field(default_factory=list)


def _prepare(config: EvaluateConfig) -> _Work:
    if config.suite == "shapes":
        shots = plan_shots(
            config.num_prompts,
            split=config.split,
            seeds=config.seeds or (0,),
            stride=config.seed_stride,
            every=config.every,
        )
        return _Work(shots=shots)
    suite = config.benchmark
    info = config.info or find_info(config.python or "", suite)
    everything = read_info(info, suite)
    entries = select_entries(everything, suite, dimensions=config.dimensions, every=config.every)
    kept = {(entry["prompt_en"], name) for entry in entries for name in entry["dimension"]}
    prompts = []
    for prompt in read_prompts(everything, suite, originals=config.originals, augmented=config.augmented):
        if names := tuple(name for name in prompt.dimensions if (prompt.text, name) in kept):
            prompts.append(dataclasses.replace(prompt, dimensions=names))
    samples = {FLICKERING: config.flickering_videos} if config.flickering_videos > 5 else None
    plan = plan_videos(suite, prompts, seeds=config.seeds, stride=config.seed_stride, samples=samples)
    return _Work(entries=entries, prompts=prompts, plan=plan)


def _claim(output_dir: Path, config: EvaluateConfig, work: _Work, names: Mapping[str, str]) -> None:
    """Write what decides the videos to `settings.json`, or require that it is what stands there."""
    made = [dataclasses.asdict(item) for item in (work.shots or work.plan)]
    settings = {**config.video_settings(), "plan": digest(made), "models": dict(names)}
    file = output_dir / "settings.json"
    if not file.exists():
        if output_dir.exists() and any(not path.name.startswith(".") for path in output_dir.iterdir()):
            raise RunError(f"{output_dir} is not empty and holds no evaluation; give another output_dir")
        write_json(file, settings)
        return
    there = read_json(file)
    if changed := [key for key in settings if there.get(key) != settings[key]]:
        raise RunError(
            f"{output_dir} was made with other {', '.join(changed)}: {[there.get(key) for key in changed]}, now "
            f"{[settings[key] for key in changed]}; give another output_dir, or the old settings"
        )


def _sampler(load: LoadPipeline, sampling: SamplingConfig) -> Sampler:
    pipe = load()
    set_scheduler_(pipe, sampling)
    pipe.set_progress_bar_config(disable=True)
    return partial(generate, pipe, config=sampling)


def _judge(config: EvaluateConfig, work: _Work, folder: Path) -> tuple[dict[str, dict[str, list[float]]], list[str]]:
    """Values of a model by dimension and prompt, and notes on what its judge left out."""
    if work.shots:
        return read_values(work.shots, folder), []
    suite, results = config.benchmark, folder / "results"
    check_videos(work.plan, folder / "videos", num_frames=config.resolved_sampling.num_frames)
    dimensions = [name for name in suite.dimensions if any(name in prompt.dimensions for prompt in work.prompts)]
    expected = expected_files(suite, work.prompts)
    filtered = config.flickering_videos > 5 and FLICKERING in dimensions
    if config.python is not None:
        roots = {name: folder / "videos" for name in dimensions if not (filtered and name == FLICKERING)}
        videos = {name: root / name if suite.folder_per_dimension else root for name, root in roots.items()}
        run_official(suite, config.python, work.entries, videos, results, gpus=config.gpus)
        if filtered:
            static = filter_static(config.python, folder / "videos", results)
            run_official(suite, config.python, work.entries, {FLICKERING: static}, results, gpus=config.gpus)
    notes = []
    values: dict[str, dict[str, list[float]]] = {}
    for name, result in collect_results(results, suite, dimensions).items():
        files = expected[name]
        if filtered and name == FLICKERING:
            kept = {path.name for path in (results / "static").iterdir()}
            files = {file: prompt for file, prompt in files.items() if file in kept}
            notes.append(f"{name}: {len(files)} of {len(expected[name])} videos, the static ones, by VBench's filter")
        values[name] = {prompt: [] for prompt in expected[name].values()} | values_by_prompt(result, suite, files)
        if left := len(files) - len({file for file, value in result.videos if value is not None}):
            notes.append(f"{name}: {left} of {len(files)} videos could not be judged and are left out")
    return values, notes


def _compare(config: EvaluateConfig, work: _Work, teacher: Any, student: Any) -> tuple[list[Any], list[str]]:
    options: dict[str, Any] = {
        "resamples": config.resamples,
        "confidence": config.confidence,
        "seed": config.bootstrap_seed,
    }
    notes = [f"{label}: {note}" for label, found in (("teacher", teacher), ("student", student)) for note in found[1]]
    if work.shots:
        return compare_shapes(teacher[0], student[0], **options), notes
    complete = set(teacher[0]) == set(config.benchmark.dimensions)
    if not complete:
        notes.append("groups and total need all dimensions and are left out")
    if config.every > 1:
        notes.append(f"on one prompt in {config.every}: not comparable with published scores")
    aggregate = config.benchmark.aggregate if complete else None
    return compare(teacher[0], student[0], aggregate=aggregate, **options), notes


def _describe(config: EvaluateConfig, work: _Work) -> dict[str, Any]:
    sampling = config.resolved_sampling
    prompts = len({shot.index for shot in work.shots} or {prompt.text for prompt in work.prompts})
    return {
        "prompts": prompts,
        "videos of each model": len(work.shots) or len(work.plan),
        "prompts given": "augmented" if config.augmented else "original",
        "seeds": f"{config.seed_stride} · place of the prompt + {list(config.seeds) if config.seeds else '0, 1, …'}",
        "sampling": (
            f"{sampling.num_frames}×{sampling.height}×{sampling.width}, {sampling.num_inference_steps} steps, "
            f"guidance {sampling.guidance_scale:g}, "
            + (f"UniPC, shift {sampling.flow_shift:g}" if sampling.scheduler == "unipc" else "the pipeline's scheduler")
        ),
        "bootstrap": f"{config.resamples} resamples of the prompts, seed {config.bootstrap_seed}",
    }
