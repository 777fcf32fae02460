"""The commands. Each is a function whose arguments are its flags.

What takes seconds to import (PyTorch, diffusers) is imported when a command runs: help does not wait for it.
"""

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ..benchmark import BenchmarkConfig
from ..distillation import DistillConfig
from ..errors import ConfigError
from ..evaluation import EvaluateConfig
from ..finetuning import FinetuneConfig
from ..generation import GenerateConfig
from ..rates import Rate, parse_rate
from ..study import StudyConfig, StudyReportConfig

Dtype = Literal["float32", "bfloat16"]
Positional = tyro.conf.Positional
console = Console()


def run(config: Positional[Path], output: Path, dry_run: bool = False) -> None:
    """Do the whole recipe of a config file in one folder, from where it stands.

    Args:
        config: TOML file. Its entries are base, prompts, videos, sample_prompts, num_samples, rates, budget, unit,
            dtype and device; its tables [distill], [finetune] and [generate] hold these commands' flags, with _ for -.
        output: run folder; `report.html` is written there at the end.
        dry_run: say what it will cost, and stop before anything is loaded or written.
    """
    from ..recipe import read_config
    from ..recipe import run as run_recipe
    from . import estimates

    settings = read_config(config)
    if dry_run:
        console.print(estimates.recipe(settings))
        return
    console.print(f"report: {run_recipe(settings, output)}")


def demo(output: Path = Path("runs/demo"), dry_run: bool = False) -> None:
    """Do the whole recipe on the embedded tiny-wan: minutes on two CPU cores, nothing is downloaded.

    Args:
        output: run folder; `report.html` is written there at the end.
        dry_run: say what it will cost, and stop.
    """
    with as_file(files("attention_surgery.recipe") / "demo.toml") as config:
        run(config, output, dry_run)


def profile(
    base: Positional[str],
    num_frames: int = 81,
    height: int = 480,
    width: int = 832,
    rate: tuple[str, ...] = (),
    degree: int = 2,
    layers: int = 2,
    dry_run: bool = False,
) -> None:
    """Count what a model's blocks cost, from its config alone.

    Args:
        base: folder or hub id of a Wan pipeline or transformer, or tiny-wan.
        num_frames: frames of the video.
        height: pixels.
        width: pixels.
        rate: BLOCK=RATE pairs, such as 0=4 7=linear; the other blocks keep softmax.
        degree: P of the feature map.
        layers: L of the feature map.
        dry_run: say what it will cost, and stop.
    """
    from .. import cost
    from ..pipelines import resolve_base
    from . import estimates

    if dry_run:
        console.print(estimates.profiling(base))
        return
    rates = {}
    for pair in rate:
        block, separator, value = pair.partition("=")
        if not separator or not block.isdecimal():
            raise ConfigError(f"--rate {pair!r}: expected BLOCK=RATE, such as 0=4 or 7=linear")
        rates[int(block)] = parse_rate(value)
    report = cost.profile(
        resolve_base(base),
        num_frames=num_frames,
        height=height,
        width=width,
        rates=rates or None,
        degree=degree,
        layers=layers,
    )
    console.print(str(report))


def distill(
    base: Positional[str],
    prompts: Path,
    output: Path,
    rates: tuple[str, ...] = ("2", "4", "8"),
    config: Annotated[DistillConfig, tyro.conf.arg(name="")] = DistillConfig(),  # noqa: B008 (frozen)
    dtype: Dtype = "bfloat16",
    device: str = "auto",
    dry_run: bool = False,
) -> None:
    """Learn feature maps for every block and rate from the teacher's own trajectories.

    Args:
        base: folder or hub id of a Wan pipeline, or tiny-wan.
        prompts: text file with one prompt per line.
        output: run folder; the maps are then in its folder bank.
        rates: candidate rates.
        config: settings of the distillation.
        dtype: of the pipeline.
        device: auto takes a GPU if there is one.
        dry_run: say what it will cost, and stop.
    """
    import torch

    from ..recipe import stages
    from . import estimates

    candidates: tuple[Rate, ...] = tuple(parse_rate(rate) for rate in rates)
    if dry_run:
        console.print(estimates.distillation(base, candidates, config, dtype))
        return
    result = stages.distill_stage(
        base,
        stages.read_prompts(prompts),
        candidates,
        output,
        config=config,
        dtype=getattr(torch, dtype),
        device=device,
    )
    console.print_json(data=result)


def select(
    base: Positional[str],
    bank: Path,
    output: Path,
    budget: float = 0.6,
    unit: Literal["flops", "latency"] = "flops",
    num_frames: int = 81,
    height: int = 480,
    width: int = 832,
    dry_run: bool = False,
) -> None:
    """Choose a rate for every block: the least error that a budget allows, exactly.

    Args:
        base: folder or hub id of a Wan pipeline, or tiny-wan.
        bank: folder of the distilled maps.
        output: JSON file for the choice and the whole Pareto front.
        budget: fraction of the all-softmax cost of the blocks.
        unit: what the budget counts.
        num_frames: frames of the video that costs are counted for.
        height: pixels.
        width: pixels.
        dry_run: say what it will cost, and stop.
    """
    from ..recipe import stages
    from . import estimates

    size = {"num_frames": num_frames, "height": height, "width": width}
    if dry_run:
        console.print(estimates.selection(base, unit, size))
        return
    result = stages.select_stage(base, bank, output, budget=budget, unit=unit, **size)
    console.print_json(data=result)


def convert(
    base: Positional[str],
    bank: Path,
    selection: Path,
    output: Path,
    dtype: Dtype = "bfloat16",
    dry_run: bool = False,
) -> None:
    """Write a converted model, as a checkpoint of its feature maps.

    Args:
        base: folder or hub id of a Wan pipeline, or tiny-wan.
        bank: folder of the distilled maps.
        selection: JSON file of select.
        output: folder of the checkpoint.
        dtype: of its weights.
        dry_run: say what it will cost, and stop.
    """
    import torch

    from ..recipe import stages
    from . import estimates

    if dry_run:
        console.print(estimates.conversion(base, dtype=dtype))
        return
    stages.convert_stage(base, bank, stages.read_rates(selection), output, dtype=getattr(torch, dtype))
    console.print(f"checkpoint: {output}")


def finetune(
    base: Positional[str],
    model: Path,
    dataset: Path,
    output: Path,
    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = FinetuneConfig(),  # noqa: B008 (frozen)
    dtype: Dtype = "bfloat16",
    device: str = "auto",
    dry_run: bool = False,
) -> None:
    """Recover a converted model on videos with captions. Runs under `accelerate launch -m attention_surgery.cli`.

    Args:
        base: folder or hub id of the Wan pipeline that was converted, or tiny-wan.
        model: checkpoint of convert.
        dataset: folder of videos with captions.
        output: run folder; the model is then in its folder model.
        config: settings of the fine-tuning.
        dtype: of the pipeline and of the written model.
        device: auto takes a GPU if there is one.
        dry_run: say what it will cost, and stop.
    """
    import torch

    from ..recipe import stages
    from . import estimates

    if dry_run:
        console.print(estimates.finetuning(base, config, dtype, dataset=dataset))
        return
    stages.finetune_stage(
        base, model, dataset, output, output / "model", config=config, dtype=getattr(torch, dtype), device=device
    )
    console.print(f"model: {output / 'model'}")


def generate(
    base: Positional[str],
    prompts: Path,
    output: Path,
    model: Path | None = None,
    first_seed: int = 0,
    config: Annotated[GenerateConfig, tyro.conf.arg(name="")] = GenerateConfig(),  # noqa: B008 (frozen)
    dtype: Dtype = "bfloat16",
    device: str = "auto",
    dry_run: bool = False,
) -> None:
    """Sample one video per prompt; those that are there already are kept.

    Args:
        base: folder or hub id of a Wan pipeline, or tiny-wan.
        prompts: text file with one prompt per line.
        output: folder for 0000.mp4 and so on.
        model: hybrid checkpoint; without it the base model is sampled.
        first_seed: of the first prompt; the next ones count up.
        config: sampling settings.
        dtype: of the pipeline.
        device: auto takes a GPU if there is one.
        dry_run: say what it will cost, and stop.
    """
    import torch

    from ..recipe import stages
    from . import estimates

    lines = stages.read_prompts(prompts)
    if dry_run:
        console.print(estimates.generation(base, len(lines), config, dtype))
        return
    stages.generate_stage(
        base,
        model,
        lines,
        output,
        config=config,
        dtype=getattr(torch, dtype),
        device=device,
        first_seed=first_seed,
    )
    console.print(f"{len(lines)} videos in {output}")


def report(run: Positional[Path], output: Path | None = None, dry_run: bool = False) -> None:
    """Write a run's report again, as one self-contained HTML file.

    Args:
        run: run folder.
        output: file to write; report.html in the folder if not given.
        dry_run: say what it will cost, and stop.
    """
    from ..report import build_report
    from . import estimates

    if dry_run:
        console.print(estimates.reporting(run))
        return
    console.print(f"report: {build_report(run, output)}")


def evaluate(
    base: Positional[str],
    model: Path,
    output: Path,
    config: Annotated[EvaluateConfig, tyro.conf.arg(name="")],
    rank: int = 0,
    world_size: int = 1,
    dtype: Dtype = "bfloat16",
    device: str = "auto",
    dry_run: bool = False,
) -> None:
    """Judge a hybrid model beside its teacher: VBench, VBench-2.0, or the small world's exact judge.

    Args:
        base: folder or hub id of the Wan pipeline that was converted, or tiny-wan.
        model: hybrid checkpoint.
        output: folder of the videos and the report.
        config: settings of the evaluation.
        rank: which share of the videos this process makes, counted from 0.
        world_size: how many processes share the videos; a last call without it judges them.
        dtype: of the pipelines.
        device: auto takes a GPU if there is one.
        dry_run: say what it will cost, and stop.
    """
    import torch

    from ..evaluation import evaluate as run_evaluation
    from ..pipelines import load_pipeline
    from ..recipe import stages
    from . import estimates

    if dry_run:
        console.print(estimates.evaluation(base, config, output, dtype))
        return
    place = {"dtype": getattr(torch, dtype), "device": device}
    outcome = run_evaluation(
        config,
        output,
        teacher=lambda: load_pipeline(base, **place),
        student=lambda: load_pipeline(base, transformer=stages.load_hybrid(base, model, dtype=place["dtype"]), **place),
        rank=rank,
        world_size=world_size,
    )
    console.print(f"videos of share {rank} are made" if outcome is None else f"report: {output / 'report.md'}")


def study(
    config: Annotated[
        Annotated[StudyConfig, tyro.conf.subcommand("serve", prefix_name=False)]
        | Annotated[StudyReportConfig, tyro.conf.subcommand("report", prefix_name=False)],
        tyro.conf.arg(name=""),
    ],
) -> None:
    """Ask people, blind: serve pairs of videos on a page, or report the votes.

    Args:
        config: of the page or of the report.
    """
    from ..study import serve, study_report

    if isinstance(config, StudyConfig):
        serve(config)
    else:
        console.print(str(study_report(config)))


def experiment(
    names: Positional[tuple[str, ...]] = (),
    output: Path = Path("runs/experiments"),
    quick: bool = False,
    seeds: tuple[int, ...] = (),
    device: str = "auto",
    processes: int = 1,
    minutes: float | None = None,
) -> None:
    """Repeat the paper's experiments, and some more, on tiny-wan.

    Args:
        names: figure3 activation normalizer pattern table3 table4 table5 figure5 recovery table6 figure4; all if none
            is named.
        output: folder of rows, tables and figures; a second call goes on there.
        quick: minutes instead of hours, to see that everything works; its numbers mean nothing.
        seeds: do only these seeds now.
        device: auto takes a GPU if there is one.
        processes: how many share the work.
        minutes: start nothing new after so long; a second call goes on.
    """
    from ..experiments import run_experiments

    pages = run_experiments(
        names, output, quick=quick, seeds=seeds, device=device, processes=processes, minutes=minutes
    )
    for name, page in pages.items():
        console.print(f"{name}: {page}")
    if not pages:
        console.print(f"rows in {output}; tables need every seed")


def benchmark(
    output: Path = Path("runs/benchmark"),
    config: Annotated[BenchmarkConfig, tyro.conf.arg(name="")] = BenchmarkConfig(),  # noqa: B008 (frozen)
    table: tuple[Path, ...] = (),
    dry_run: bool = False,
) -> None:
    """Time hybrid attention against the fastest dense attention of this device: operator, block, transformer, training.

    Everything is checked against float64 before it is timed, and takes turns with what it is compared with. What is
    wrong or does not run is not timed: it is named at the end, and the command fails. Afterwards --table puts the
    figures where people read them.

    Args:
        output: folder of benchmark.csv, which is written anew after every case.
        config: what to measure.
        table: measure nothing; draw figures of these CSV files beside them, and write the tables of README.md and
            docs/performance.md, in the current folder, from them.
        dry_run: list the cases, and stop.
    """
    from ..benchmark import check_rows, describe_plan, publish_results, run_benchmark

    if table:
        for path in publish_results(table, Path()):
            console.print(f"written: {path}")
        return
    if dry_run:
        console.print(describe_plan(config), highlight=False, markup=False, soft_wrap=True)
        return
    rows = run_benchmark(
        config, output, say=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)
    )
    check_rows(rows)
    console.print(f"results: {output / 'benchmark.csv'}")
