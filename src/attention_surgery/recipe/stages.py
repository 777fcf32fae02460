"""The stages of a surgery, each from and to files, each resumable. The command line and `run` call the same ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..checkpoint import from_pretrained, save_pretrained
from ..cost import block_costs, profile
from ..distillation import DistillConfig, FeatureMapBank, distill
from ..errors import DataError, RunError
from ..files import read_json, write_json
from ..finetuning import FinetuneConfig, finetune
from ..generation import GenerateConfig, generate, write_video
from ..models import convert_
from ..pipelines import load_pipeline, resolve_base
from ..progress import progress
from ..rates import Rate, parse_rate
from ..selection import Selection, homogeneous_rates, pareto_front, select_rates

console = Console(stderr=True)


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
    """Distil into `folder`, going on where it stands; the bank is at `folder/bank`."""
    if (folder / "bank" / "bank.json").exists():
        bank = FeatureMapBank.from_pretrained(folder / "bank")
    else:
        pipe = load_pipeline(base, dtype=dtype, device=device)
        bank = distill(pipe, prompts, rates, config=config, output_dir=folder, resume=folder.exists())
    return {"errors": {str(b): {str(r): e for r, e in row.items()} for b, row in bank.errors.items()}}


def select_stage(
    base: str,
    bank_folder: Path,
    file: Path,
    *,
    budget: float,
    unit: str,
    rates: Sequence[Rate] | None = None,
    shape: Mapping[str, int],
) -> dict[str, Any]:
    """Choose a rate per block under `budget` and write it, with the whole Pareto front, to `file`."""
    bank = FeatureMapBank.from_pretrained(bank_folder)
    candidates = tuple(rates or bank.rates)
    config = transformer_config(base)
    costs = block_costs(
        config,
        (1, *candidates),
        unit=unit,
        degree=bank.spec.degree,
        layers=bank.spec.layers,
        **shape,  # type: ignore[arg-type]
    )
    costs = {block: costs[block] for block in bank.blocks}
    errors = {block: {rate: row[rate] for rate in candidates} for block, row in bank.errors.items()}
    chosen = select_rates(errors, costs, budget=budget)
    result = {
        "budget": budget,
        "unit": unit,
        "shape": dict(shape),
        "rates": rates_to_json(chosen.rates),
        "error": chosen.error,
        "cost": chosen.cost,
        "pareto_front": [
            {"rates": rates_to_json(point.rates), "error": point.error, "cost": point.cost}
            for point in pareto_front(errors, costs)
        ],
        "homogeneous": homogeneous_points(errors, costs, candidates),
    }
    write_json(file, result)
    return {"rates": result["rates"], "error": chosen.error, "cost": chosen.cost}


def homogeneous_points(
    errors: Mapping[int, Mapping[Rate, float]], costs: Mapping[int, Mapping[Rate, float]], rates: Sequence[Rate]
) -> list[dict[str, Any]]:
    """The paper's baseline, n blocks of lowest error at one rate, for every n and rate: error and cost fraction."""
    dense = sum(row[1] for row in costs.values())
    points = []
    for rate in rates:
        for count in range(1, len(errors) + 1):
            choice = homogeneous_rates(errors, rate=rate, blocks=count)
            points.append(
                {
                    "rate": rate,
                    "blocks": count,
                    "error": sum(errors[block][r] for block, r in choice.items() if r != 1),
                    "cost": sum(costs[block][choice.get(block, 1)] for block in costs) / dense,
                }
            )
    return points


def convert_stage(
    base: str, bank_folder: Path, rates: Mapping[int, Rate], folder: Path, *, dtype: torch.dtype
) -> dict[str, Any]:
    """Convert the base model, load its distilled maps, and write a φ-only checkpoint."""
    bank = FeatureMapBank.from_pretrained(bank_folder)
    model = load_transformer(base, dtype)
    convert_(model, bank.hybrid_config(rates))
    bank.load_into_(model)
    save_pretrained(model, folder, weights="phi")
    return {"converted_blocks": len(model.hybrid_config.rates)}


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
) -> dict[str, Any]:
    """Fine-tune the converted model in `folder`, going on where it stands, and write it to `model_folder`."""
    master = torch.float32 if config.trainable != "lora" else dtype
    transformer = from_pretrained(converted, base_model=resolve_base(base), torch_dtype=master)
    pipe = load_pipeline(base, dtype=dtype, device=device, transformer=transformer)
    finetune(pipe, dataset, config=config, output_dir=folder, resume=(folder / "config.json").exists())
    save_pretrained(pipe.transformer.to(dtype), model_folder, weights="all")
    return {}
