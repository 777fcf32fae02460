"""The stages of a surgery, each from and to files, each resumable. The command line and `run` call the same ones."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import from_pretrained, load_transformer, save_pretrained
from ..checkpoint.identity import weights_digest
from ..cost import block_costs, profile
from ..distillation import DistillConfig, FeatureMapBank, distill
from ..errors import DataError, ModelError
from ..files import read_json, write_json
from ..finetuning import FinetuneConfig, finetune
from ..generation import GenerateConfig, generate, write_video
from ..models import HybridWanTransformer3DModel, convert_
from ..models.wan import read_wan
from ..pipelines import load_pipeline, resolve_base
from ..processes import join_processes, refuse_several
from ..progress import progress
from ..rates import Rate, parse_rate
from ..selection import homogeneous_rates, pareto_front, select_rates
from .folder import claim, is_claimed


def read_prompts(path: str | Path) -> list[str]:
    """The non-empty lines of a text file. DataError if there is none, or no such file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read as a list of prompts: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{path} holds no prompts; write one per line")
    return prompts


def read_rates(path: str | Path) -> dict[int, Rate]:
    """The rates that `select_stage` wrote. DataError if the file is something else."""
    try:
        return {int(block): parse_rate(str(rate)) for block, rate in read_json(path)["rates"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no choice of rates, as `select` writes it: {error!r}") from error


def distill_stage(
    base: str,
    prompts: Sequence[str],
    rates: Sequence[Rate],
    folder: Path,
    *,
    config: DistillConfig,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Any]:
    """Distil into `folder`, going on where it stands; the bank is then at `folder/bank`."""
    pipe = load_pipeline(base, dtype=dtype, device=device)
    bank = distill(pipe, prompts, rates, config=config, output_dir=folder, resume=(folder / "config.json").exists())
    return {"errors": {str(b): {str(r): e for r, e in row.items()} for b, row in bank.errors.items()}}


def select_stage(base: str, bank_folder: Path, file: Path, *, budget: float, unit: str, **shape: int) -> dict[str, Any]:
    """Choose a rate per block under `budget`; write it, the Pareto front and homogeneous choices to `file`."""
    bank = FeatureMapBank.from_pretrained(bank_folder)
    phi = {"degree": bank.spec.degree, "layers": bank.spec.layers}
    table = block_costs(resolve_base(base), (1, *bank.rates), unit=unit, **phi, **shape)  # type: ignore[arg-type]
    costs = {block: table[block] for block in bank.blocks}
    chosen = select_rates(bank.errors, costs, budget=budget)
    dense = sum(row[1] for row in costs.values())
    homogeneous = []
    for rate in bank.rates:
        for count in range(1, len(bank.blocks) + 1):
            rates = homogeneous_rates(bank.errors, rate=rate, blocks=count)
            error = sum(bank.errors[block][r] for block, r in rates.items() if r != 1)
            cost = sum(costs[block][rates.get(block, 1)] for block in costs) / dense
            homogeneous.append({"rate": rate, "blocks": count, "error": error, "cost": cost})
    front = [point.to_dict() for point in pareto_front(bank.errors, costs)]
    result = {"unit": unit, "shape": shape, **chosen.to_dict(), "budget": budget}
    write_json(file, result | {"pareto_front": front, "homogeneous": homogeneous})
    return {name: result[name] for name in ("rates", "error", "cost")}


def convert_stage(
    base: str, bank_folder: Path, rates: Mapping[int, Rate], folder: Path, *, dtype: torch.dtype
) -> dict[str, Any]:
    """Convert the base model at `rates`, load its distilled maps, and write a φ-only checkpoint.

    Raises:
        ModelError: the maps were distilled from other weights.
    """
    bank = FeatureMapBank.from_pretrained(bank_folder)
    model = load_transformer(base, dtype=dtype)
    if bank.provenance.get("weights") not in (None, weights_digest(model)):
        raise ModelError(f"{bank_folder} was distilled from other weights than those of {base}: distil it anew")
    convert_(model, bank.hybrid_config(rates))
    bank.load_into_(model)
    errors = {str(b): {str(r): e for r, e in row.items()} for b, row in bank.errors.items()}
    save_pretrained(model, folder, weights="phi", provenance={"errors": errors, "distillation": bank.provenance})
    return {"converted_blocks": sum(rate != 1 for rate in rates.values())}


def finetune_stage(
    base: str,
    converted: Path,
    dataset: Path,
    folder: Path,
    model_folder: Path,
    *,
    config: FinetuneConfig,
    dtype: torch.dtype,
    device: str,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fine-tune the converted model in `folder`, going on where it stands, and write it whole to `model_folder`."""
    transformer = load_hybrid(base, converted, dtype=dtype)
    pipe = load_pipeline(base, dtype=dtype, device=device, transformer=transformer)
    finetune(pipe, dataset, config=config, output_dir=folder, resume=(folder / "config.json").exists())
    processes = join_processes(cpu=pipe._execution_device.type == "cpu")
    if processes.is_main_process:
        save_pretrained(pipe.transformer.to(dtype), model_folder, weights="all", provenance=provenance)
    processes.wait_for_everyone()
    return {}


def load_hybrid(base: str, checkpoint: Path, *, dtype: torch.dtype) -> HybridWanTransformer3DModel:
    """A hybrid checkpoint, on the base model if it holds the feature maps only."""
    phi_only = (checkpoint / "phi.safetensors").exists()
    source: dict[str, Any] = {"base_model": load_transformer(base, dtype=dtype)} if phi_only else {"dtype": dtype}
    return from_pretrained(checkpoint, **source)


def generate_stage(
    base: str,
    checkpoint: Path | None,
    prompts: Sequence[str],
    folder: Path,
    *,
    config: GenerateConfig,
    dtype: torch.dtype,
    device: str,
    first_seed: int = 0,
) -> dict[str, Any]:
    """One video per prompt at `folder/0000.mp4` …, of the base model or a hybrid checkpoint; those there are kept.

    `folder/generate.json` says what they were made with.

    Raises:
        ConfigError: a video size that the model does not take.
        RunError: `folder` holds something else, or videos of other prompts, seeds, settings or weights.
    """
    settings = {
        "base": base,
        "weights": base_digest(base),
        "checkpoint": None if checkpoint is None else _checkpoint_digest(checkpoint),
        "prompts": {f"{i:04d}": prompt for i, prompt in enumerate(prompts)},
        "first_seed": first_seed,
        "dtype": str(dtype).removeprefix("torch."),
        "sampling": dataclasses.asdict(config),
    }
    refuse_several("generate")
    read_wan(resolve_base(base)).grid(config.num_frames, config.height, config.width)
    is_claimed(folder, "generate.json", settings)
    missing = [i for i in range(len(prompts)) if not (folder / f"{i:04d}.mp4").exists()]
    if missing:
        components = {} if checkpoint is None else {"transformer": load_hybrid(base, checkpoint, dtype=dtype)}
        pipe = load_pipeline(base, dtype=dtype, device=device, **components)
        claim(folder, "generate.json", settings)
        pipe.set_progress_bar_config(disable=True)
        with progress(f"generate {folder.name}", len(prompts), done=len(prompts) - len(missing)) as advance:
            for i in missing:
                (video,) = generate(pipe, [prompts[i]], [first_seed + i], config=config)
                write_video(folder / f"{i:04d}.mp4", video, fps=config.fps)
                advance("")
    return {"videos": len(prompts)}


def base_digest(base: str) -> str | None:
    """Tells the weights of a local base model from those that its folder held before; None for a hub id."""
    folder = Path(resolve_base(base)) / "transformer"
    return _checkpoint_digest(folder) if folder.is_dir() else None


def _checkpoint_digest(folder: Path) -> str:
    """Tells checkpoints apart by their configs and the first mebibyte of each file of weights."""
    hasher = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")):
        with open(file, "rb") as content:
            hasher.update(f"{file.name} {file.stat().st_size}".encode() + content.read(2**20))
    return hasher.hexdigest()


def profile_stage(
    base: str, file: Path, *, rates: Mapping[int, Rate] | None, phi: Mapping[str, int], **shape: int
) -> dict[str, Any]:
    """Count the blocks' FLOPs before, and after if `rates` are known, and write both to `file`."""
    dense = profile(resolve_base(base), rates=None, **shape)
    models = {"softmax everywhere (before)": dense}
    if rates is not None:
        models["hybrid (after)"] = profile(resolve_base(base), rates=rates, **phi, **shape)  # type: ignore[arg-type]
    rows = {
        label: {
            "total_flops": report.total_flops,
            "attention_share": report.attention_share,
            "core_share": report.core_share,
            "remaining": report.remaining,
        }
        for label, report in models.items()
    }
    write_json(file, {"tokens": dense.tokens, "models": rows})
    return {"tokens": dense.tokens, **rows[list(rows)[-1]]}
