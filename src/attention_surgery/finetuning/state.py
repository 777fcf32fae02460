"""Checkpoints of a fine-tuning: whole or absent, the last few kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError

from ..errors import CheckpointError, RunError
from ..files import read_json, read_jsonl, read_torch, write_text


def check_folder(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Check that `folder` is empty but for a latent cache, or a run with these settings. RunError otherwise."""
    file = folder / "config.json"
    if not file.exists():
        if folder.exists() and any(path.name != "cache" for path in folder.iterdir()):
            raise RunError(f"{folder} is not empty and holds no fine-tuning run; give another output_dir")
        return
    if not resume:
        raise RunError(f"{folder} holds a fine-tuning run; pass resume=True to go on, or another output_dir")
    before = read_json(file)
    for key in ("weights", "videos"):  # older folders do not say
        before.setdefault(key, settings[key])
    before.setdefault("compile", False)
    changed = [
        f"{key}: {before.get(key)!r} → {settings.get(key)!r}"
        for key in sorted(before.keys() | settings.keys())
        if before.get(key) != settings.get(key)
    ]
    if changed:
        raise RunError(f"{folder} was made with other settings ({'; '.join(changed)}); give another output_dir")


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if (path / "done").exists())


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, ema: EMAModel | None, keep: int) -> None:
    """Write weights, optimizer, random states and averages under a temporary name, then rename; drop the oldest.

    Raises:
        RunError: it could not be written, for example on a full disk; the last checkpoint stands.
    """
    final = folder / "checkpoints" / f"step-{step:07d}"
    staging = final.with_name(f".{final.name}")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(staging))
        if accelerator.is_main_process:
            if ema is not None:
                torch.save(ema.state_dict(), staging / "ema.pt")
            (staging / "done").touch()
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
            for old in checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise RunError(
            f"the checkpoint of step {step} cannot be written to {final}: {error}; earlier ones stand"
        ) from error
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path, ema: EMAModel | None) -> int:
    """Load the last whole checkpoint into what `accelerator` holds; return its step, 0 if there is none.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    found = checkpoints(folder)
    if not found:
        return 0
    try:
        accelerator.load_state(str(found[-1]))
        if ema is not None:
            ema.load_state_dict(read_torch(found[-1] / "ema.pt", device=accelerator.device))
    except Exception as error:  # damage may look like anything to those who read it
        raise CheckpointError(
            f"{found[-1]} cannot be loaded: {error}; delete it, and the run goes on from the one before"
        ) from error
    return int(found[-1].name.removeprefix("step-"))


def trim_log(file: Path, step: int) -> None:
    """Drop what a run that was killed had logged after the checkpoint that it goes on from."""
    if file.exists():
        rows = [row for row in read_jsonl(file) if row["step"] < step or ("loss" in row and row["step"] == step)]
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
