"""`python -m attention_surgery.teacher train|evaluate|install|rescore`, of tiny-wan, the embedded pipeline."""

import argparse
import dataclasses
import json
import os
from pathlib import Path

import torch
from diffusers import WanPipeline

from ..files import write_json
from .config import CPU, TeacherConfig
from .evaluate import HELDOUT, SEEN, captions_for, evaluate_teacher, judge_all, means, sample
from .install import install, install_scores
from .train import train_teacher


def main() -> None:
    """Parse the command line and run one of the three commands."""
    parser = argparse.ArgumentParser(prog="python -m attention_surgery.teacher", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train tiny-wan in a folder; call again to go on")
    train.add_argument("folder", type=Path)
    train.add_argument("--recipe", choices=("gpu", "cpu"), default="gpu")
    train.add_argument("--scratch", type=Path, help="where the rendered clips go")
    train.add_argument("--slice-minutes", type=float, default=float("inf"))
    train.add_argument("--start-from", type=Path, help="a finished pipeline whose weights to start from")
    train.add_argument("--vae-minutes", type=float)
    train.add_argument("--diffusion-minutes", type=float)
    train.add_argument("--batch", type=int)
    evaluate = commands.add_parser("evaluate", help="sample 200 seen and 100 held-out captions, and judge them")
    evaluate.add_argument("pipeline", type=Path)
    evaluate.add_argument("folder", type=Path)
    evaluate.add_argument("--guidance", type=float, nargs="+", default=[TeacherConfig().guidance])
    evaluate.add_argument("--steps", type=int, default=TeacherConfig().steps)
    evaluate.add_argument("--batch", type=int, default=10)
    evaluate.add_argument("--scale", type=float, default=1.0, help="share of the captions, for a trial")
    put = commands.add_parser("install", help="put a trained and evaluated pipeline into the package, with its card")
    put.add_argument("folder", type=Path, help="of train")
    put.add_argument("evaluation", type=Path, help="folder of evaluate")
    put.add_argument("--earlier", type=Path, nargs="*", default=[], help="folders of the runs that it started from")
    rescore = commands.add_parser("rescore", help="put another evaluation of the shipped pipeline into its card")
    rescore.add_argument("evaluation", type=Path, help="folder of evaluate")
    arguments = parser.parse_args()
    if arguments.command == "train":
        config = CPU if arguments.recipe == "cpu" else TeacherConfig()
        changes = {name: getattr(arguments, name) for name in ("vae_minutes", "diffusion_minutes", "batch")}
        config = dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
        train_teacher(
            config,
            arguments.folder,
            scratch=arguments.scratch,
            slice_minutes=arguments.slice_minutes,
            start_from=arguments.start_from,
        )
    elif arguments.command == "evaluate":
        _evaluate(arguments)
    elif arguments.command == "rescore":
        install_scores(arguments.evaluation)
    else:
        install(arguments.folder, arguments.evaluation, earlier=arguments.earlier)


def _evaluate(arguments: argparse.Namespace) -> None:
    """Pick the guidance on captions of its own if several are given, then score with it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = WanPipeline.from_pretrained(arguments.pipeline, dtype=torch.float32).to(device)
    processes = max(1, (os.cpu_count() or 1) - 1)
    guidance = arguments.guidance[0]
    tried = {}
    if len(arguments.guidance) > 1:
        captions = captions_for("train", 264)[200:]
        for value in arguments.guidance:
            clips = sample(
                pipe, captions, guidance=value, steps=arguments.steps, batch=arguments.batch, first_seed=10_000
            )
            tried[value] = means(judge_all(clips, captions, processes=processes))
            print(f"guidance {value}: {json.dumps(tried[value])}", flush=True)
        guidance = max(tried, key=lambda value: tried[value]["semantic"])
    result = evaluate_teacher(
        pipe,
        arguments.folder,
        guidance=guidance,
        steps=arguments.steps,
        batch=arguments.batch,
        processes=processes,
        scale=arguments.scale,
    )
    clips = {"train": max(1, round(SEEN * arguments.scale)), "heldout": max(1, round(HELDOUT * arguments.scale))}
    settings = {
        "clips": clips,
        "guidance": guidance,
        "steps": arguments.steps,
        "guidance_tried": {str(k): v for k, v in tried.items()},
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
    }
    write_json(arguments.folder / "evaluation.json", settings | {"scores": result})
    print(json.dumps(result, indent=2), flush=True)


if __name__ == "__main__":
    main()
