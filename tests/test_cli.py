"""The command line as a user sees it: help, dry runs, errors, one stage after the other."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from micro_wan import micro_pipeline
from processes import NO_GPU, launch_two_processes
from test_recipe import SHAPE, finished, world  # noqa: F401 (fixtures)

import attention_surgery as asg
from attention_surgery.cli import estimates, main
from attention_surgery.cli.main import COMMANDS as CALLED
from attention_surgery.distillation import DistillConfig, FeatureMapBank
from attention_surgery.evaluation import EvaluateConfig, SamplingConfig
from attention_surgery.files import read_jsonl
from attention_surgery.finetuning import FinetuneConfig
from attention_surgery.generation import GenerateConfig
from attention_surgery.layers import FeatureMap
from attention_surgery.models.wan import WanSpec
from attention_surgery.recipe import RecipeConfig
from attention_surgery.study import StudyConfig, StudyReportConfig

COMMANDS = (
    "run",
    "demo",
    "profile",
    "distill",
    "select",
    "convert",
    "finetune",
    "generate",
    "report",
    "evaluate",
    "study",
)
SMALL = ["--num-frames", "9", "--height", "64", "--width", "64"]


def surgery(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attention_surgery.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_help_lists_every_command():
    result = surgery("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in COMMANDS)


def test_help_shows_the_flags_of_settings_with_their_meaning():
    result = surgery("finetune", "--help")
    assert result.returncode == 0
    for words in ("--dry-run", "--output", "--validate-every", "steps between two validations"):
        assert words in " ".join(result.stdout.split())


SETTINGS = (DistillConfig, FinetuneConfig, GenerateConfig, SamplingConfig, EvaluateConfig, RecipeConfig, StudyConfig)


@pytest.mark.parametrize("thing", [*CALLED.values(), *SETTINGS, StudyReportConfig], ids=lambda thing: thing.__name__)
def test_every_flag_is_explained(thing):
    """What a docstring says of an argument is the flag's help; `a, b: …` would explain neither."""
    own = [name for name in inspect.signature(thing).parameters]
    docs = "\n".join(inspect.getdoc(cls) or "" for cls in (getattr(thing, "__mro__", (thing,))))
    assert [name for name in own if not re.search(rf"^ +{name}: ", docs, re.MULTILINE)] == []


def test_profile_says_which_percentage_is_which(world):  # noqa: F811
    result = surgery("profile", world / "base", *SMALL, "--rate", "0=2", "2=linear")
    assert result.returncode == 0, result.stderr
    assert "%" in result.stdout and "linear" in result.stdout


def test_dry_runs_write_nothing(world, tmp_path):  # noqa: F811
    result = surgery("run", world / "recipe.toml", "--output", tmp_path / "run", "--dry-run")
    assert result.returncode == 0, result.stderr
    for word in ("GiB", "teacher forwards", "steps of 2 videos", "transformer forwards"):
        assert word in " ".join(result.stdout.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["profile"], ("no weights", "no disk")),
        (["distill", "--prompts", "PROMPTS", "--output", "OUT"], ("FLOP", "teacher forwards", "memory", "disk")),
        (["select", "--bank", "OUT", "--output", "OUT"], ("meta device", "disk")),
        (["select", "--bank", "OUT", "--output", "OUT", "--unit", "latency"], ("timed", "memory", "disk")),
        (["convert", "--bank", "OUT", "--selection", "OUT", "--output", "OUT"], ("memory", "disk")),
        (["finetune", "--model", "OUT", "--dataset", "VIDEOS", "--output", "OUT"], ("FLOP", "memory", "of 4 videos")),
        (["generate", "--prompts", "PROMPTS", "--output", "OUT"], ("3 videos", "forwards", "FLOP", "weights", "disk")),
        (
            ["evaluate", "--model", "OUT", "--output", "OUT", "--suite", "shapes"],
            ("200 videos", "forwards", "FLOP", "weights", "disk"),
        ),
    ],
    ids=lambda value: "-".join(value[:1]) if isinstance(value, list) else "",
)
def test_a_dry_run_of_each_stage_reads_configs_only(world, tmp_path, monkeypatch, capsys, command, words):  # noqa: F811
    """The base has no weights, and what earlier stages write is not there."""
    shutil.copytree(world / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    places = {"PROMPTS": world / "prompts.txt", "VIDEOS": world / "videos", "OUT": tmp_path / "out"}
    name, *arguments = (str(places.get(word, word)) for word in command)
    sized = [] if name in ("convert", "evaluate") else SMALL
    monkeypatch.setattr("sys.argv", ["x", name, str(tmp_path / "base"), *arguments, *sized, "--dry-run"])
    main()
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(f"{name}: ") and all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_dry_runs_count_the_weights_that_are_there():
    pipe = micro_pipeline()
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        counted = estimates.read_base(folder).parameters
    for name, module in {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder, "vae": pipe.vae}.items():
        assert counted[name] == sum(parameter.numel() for parameter in module.parameters())
    spec = WanSpec(blocks=3, heads=2, head_dim=12, ffn_dim=48)
    pair = sum(parameter.numel() for parameter in FeatureMap(2, 12, degree=3, layers=3).parameters())
    assert estimates.map_parameters(spec, 3, 3) == 2 * pair


def test_more_training_needs_more(world):  # noqa: F811
    """Memory and disk of fine-tuning rise with what is trained and kept."""

    def numbers(**changes):
        config = FinetuneConfig(num_frames=9, height=64, width=64, **changes)
        said = estimates.finetuning(str(world / "base"), config, "bfloat16")
        units = {"KiB": 1, "MiB": 2**10, "GiB": 2**20}
        return [float(n) * units[unit] for n, unit in re.findall(r"([\d.]+) (KiB|MiB|GiB)", said)]

    full, phi = numbers(trainable="all"), numbers(trainable="phi")
    assert phi[0] < full[0] and phi[2] < full[2]
    assert numbers(ema_decay=0.9)[0] > full[0] and numbers(keep_checkpoints=5)[2] == pytest.approx(2 * full[2], rel=0.1)
    assert numbers(objective="teacher")[0] > full[0]
    assert numbers(gradient_checkpointing=False)[1] > full[1]


def test_errors_are_one_message_and_status_2(tmp_path):
    (tmp_path / "c.toml").write_text("bse = 1")
    result = surgery("run", tmp_path / "c.toml", "--output", tmp_path / "run")
    assert result.returncode == 2
    assert "ConfigError" in result.stderr and "'bse' does not exist" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


def test_judges_are_reached(tmp_path):
    missing = surgery("study", "report", "--database", tmp_path / "none.sqlite")
    assert missing.returncode == 2 and "StudyError" in missing.stderr
    cost = surgery(
        "evaluate", "tiny-wan", "--model", tmp_path, "--output", tmp_path / "e", "--suite", "shapes", "--dry-run"
    )
    assert cost.returncode == 0, cost.stderr
    assert "forward" in cost.stdout and not (tmp_path / "e").exists()


def shared_stages(world, model) -> dict[str, list]:  # noqa: F811
    """The stages that several processes share, and their arguments."""
    return {
        "distill": [
            world / "base", "--prompts", world / "prompts.txt", "--rates", "2", "4", "linear",
            "--num-trajectories", "2", "--num-inference-steps", "2", "--heldout-prompts", "1",
        ],
        "finetune": [
            world / "base", "--model", model, "--dataset", world / "videos", "--batch-size", "2",
            "--max-steps", "2", "--heldout-videos", "1", "--fps", "8",
        ],
    }  # fmt: skip


def test_two_processes_distil_and_finetune_as_one_does(world, finished, tmp_path):  # noqa: F811
    """`accelerate launch -m attention_surgery.cli`: the passes, and the batch, are shared."""
    launch = [*launch_two_processes(29617), "-m", "attention_surgery.cli"]
    small = [*SMALL, "--max-sequence-length", "16", "--dtype", "float32", "--device", "cpu"]
    stages = shared_stages(world, finished / "converted")
    for stage, arguments in stages.items():
        command = [*launch, stage, *map(str, arguments), "--output", str(tmp_path / stage), *small]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | NO_GPU
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
    shared, alone = (
        FeatureMapBank.from_pretrained(folder / "bank") for folder in (tmp_path / "distill", finished / "distill")
    )
    assert json.loads((tmp_path / "distill" / "config.json").read_text())["plan"] == [[0, 2], [1]]
    for block, row in alone.errors.items():
        assert shared.errors[block] == pytest.approx(row, rel=1e-3)
    losses = [
        [row["loss"] for row in read_jsonl(folder / "log.jsonl") if "loss" in row]
        for folder in (tmp_path / "finetune", finished / "finetune")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    model = asg.from_pretrained(tmp_path / "finetune" / "model")
    for name, tensor in asg.from_pretrained(finished / "model").state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    assert sorted(path.name for path in (tmp_path / "finetune").iterdir()) == [
        "cache", "checkpoints", "config.json", "log.jsonl", "model",
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_distil_and_finetune_as_one_does(world, tmp_path):  # noqa: F811
    """Each process on a GPU of its own, joined by NCCL."""
    small = [*SMALL, "--max-sequence-length", "16", "--dtype", "float32"]
    bank = tmp_path / "distill-alone" / "bank"
    rates = tmp_path / "rates.json"
    stages = shared_stages(world, tmp_path / "converted")
    launches = {
        "alone": [sys.executable, "-m", "attention_surgery.cli"],
        "shared": [*launch_two_processes(29631), "-m", "attention_surgery.cli"],
    }
    for stage, arguments in stages.items():
        if stage == "finetune":
            surgery("select", world / "base", "--bank", bank, "--output", rates, "--budget", "0.99", *SMALL)
            surgery("convert", world / "base", "--bank", bank, "--selection", rates, "--output", tmp_path / "converted")
        for name, launch in launches.items():
            command = [*launch, stage, *map(str, arguments), "--output", str(tmp_path / f"{stage}-{name}"), *small]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
    alone, shared = (FeatureMapBank.from_pretrained(tmp_path / f"distill-{name}" / "bank") for name in launches)
    assert len(json.loads((tmp_path / "distill-shared" / "config.json").read_text())["plan"]) == 2
    for block, row in alone.errors.items():
        assert shared.errors[block] == pytest.approx(row, rel=1e-3)
    losses = [
        [row["loss"] for row in read_jsonl(tmp_path / f"finetune-{name}" / "log.jsonl") if "loss" in row]
        for name in launches
    ]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_a_run_of_several_processes_is_refused(world, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (
        ["run", world / "recipe.toml"],
        ["generate", world / "base", "--prompts", world / "prompts.txt"],
    ):
        refused = surgery(*command, "--output", tmp_path / "out")
        assert refused.returncode == 2 and f"{command[0]} is one process" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_stage_by_stage(world, finished, tmp_path):  # noqa: F811
    """The commands after distillation, on the maps of a finished run."""
    base, bank, small = world / "base", finished / "distill" / "bank", SMALL
    chosen = surgery("select", base, "--bank", bank, "--output", tmp_path / "s.json", "--budget", "0.99", *small)
    assert chosen.returncode == 0, chosen.stderr
    assert (
        json.loads((tmp_path / "s.json").read_text())["rates"]
        == json.loads((finished / "selection.json").read_text())["rates"]
    )
    infeasible = surgery("select", base, "--bank", bank, "--output", tmp_path / "no.json", "--budget", "0.01", *small)
    assert infeasible.returncode == 2 and "SelectionError" in infeasible.stderr
    assert not (tmp_path / "no.json").exists()
    converted = surgery(
        "convert", base, "--bank", bank, "--selection", tmp_path / "s.json", "--output", tmp_path / "converted"
    )
    assert converted.returncode == 0, converted.stderr
    (tmp_path / "p.txt").write_text("a red ball\n")
    videos = surgery(
        "generate", base, "--prompts", tmp_path / "p.txt", "--output", tmp_path / "videos", "--model",
        tmp_path / "converted", "--num-inference-steps", "2", "--max-sequence-length", "16", "--dtype", "float32",
        "--device", "cpu", *small,
    )  # fmt: skip
    assert videos.returncode == 0, videos.stderr
    assert [path.name for path in Path(tmp_path / "videos").glob("*.mp4")] == ["0000.mp4"]
    assert "max_sequence_length" in SHAPE
