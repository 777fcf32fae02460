"""The command line as a user sees it: help, dry runs, errors, one stage after the other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_recipe import SHAPE, finished, world  # noqa: F401 (fixtures)

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


@pytest.mark.parametrize("command", ["run", "distill", "finetune"])
def test_every_flag_is_explained(command):
    result = surgery(command, "--help")
    assert result.returncode == 0 and "--dry-run" in result.stdout and "--output" in result.stdout


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
    assert [path.name for path in Path(tmp_path / "videos").iterdir()] == ["0000.mp4"]
    assert "max_sequence_length" in SHAPE
