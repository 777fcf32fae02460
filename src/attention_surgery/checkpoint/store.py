"""`save_pretrained` and `from_pretrained`: hybrid checkpoints, whole or φ only, strict both ways."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, ConfigError, ModelError
from ..files import read_json, write_json, write_tensors, write_text
from ..models import HybridConfig, HybridWanTransformer3DModel, convert_, revert_
from ..pipelines import resolve_base
from .card import model_card
from .identity import base_name, fingerprint, is_phi

PHI_FILE = "phi.safetensors"
PHI_FORMAT = 1
Weights = Literal["all", "phi"]


def save_pretrained(
    model: WanTransformer3DModel,
    directory: str | Path,
    *,
    weights: Weights = "all",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a hybrid checkpoint with a model card; the directory is whole afterwards, or as it was before.

    Args:
        model: a converted model.
        directory: a new one, an empty one, or an earlier hybrid checkpoint, which is replaced.
        weights: "all" for every weight (diffusers' layout), "phi" for the feature maps only, together with the
            identity of the base model they belong to.
        provenance: how the model was made (errors, cost, settings), for the card.

    Raises:
        ModelError: `model` is not converted.
        ConfigError: another value of `weights`.
        CheckpointError: `directory` holds something else.
    """
    if not isinstance(model, HybridWanTransformer3DModel):
        raise ModelError(f"cannot save a {type(model).__name__} as a hybrid checkpoint: convert_ it first")
    if weights not in ("all", "phi"):
        raise ConfigError(f"weights={weights!r} does not exist; expected 'all' or 'phi'")
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()) and not _is_checkpoint(directory):
        raise CheckpointError(f"{directory} is not empty and holds no hybrid checkpoint; give another directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        staging.chmod(0o755)
        if weights == "all":
            model.save_pretrained(staging)
        else:
            write_tensors(staging / PHI_FILE, {k: v for k, v in model.state_dict().items() if is_phi(k)})
            base = {"name": base_name(model), "fingerprint": fingerprint(model)}
            write_json(
                staging / "config.json",
                {"phi_format": PHI_FORMAT, "hybrid": model.hybrid_config.to_dict(), "base": base},
            )
        write_text(staging / "README.md", model_card(model, weights=weights, provenance=provenance or {}))
        _replace(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def from_pretrained(
    repo_or_dir: str | Path,
    *,
    base_model: str | Path | WanTransformer3DModel | None = None,
    **diffusers_kwargs: Any,
) -> HybridWanTransformer3DModel:
    """Load a hybrid checkpoint, whole or φ only; every key must be there, and no other.

    Args:
        repo_or_dir: a directory or a hub repository.
        base_model: for a φ-only checkpoint, the model it belongs to: a stock transformer (converted in place), or a
            path or hub id of one or of its pipeline. Default: where it came from when it was saved.
        diffusers_kwargs: passed to diffusers' `from_pretrained` (torch_dtype, …).

    Raises:
        CheckpointError: a missing, unexpected or wrongly shaped key; a damaged file; a newer format; a base model whose
            weights are not those that the feature maps were saved with. A given `base_model` is unchanged then.
    """
    directory = Path(repo_or_dir)
    if not directory.is_dir():
        directory = Path(snapshot_download(str(repo_or_dir)))
    config = _read_config(directory)
    if not (directory / PHI_FILE).exists():
        if base_model is not None:
            raise CheckpointError(f"{repo_or_dir} holds all weights; base_model is for φ-only checkpoints")
        try:
            return HybridWanTransformer3DModel.from_pretrained(directory, **diffusers_kwargs)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{repo_or_dir} cannot be loaded as a hybrid checkpoint: {error}") from error
    if config.get("phi_format") != PHI_FORMAT:
        raise CheckpointError(
            f"{repo_or_dir} has φ format {config.get('phi_format')!r}; this version reads {PHI_FORMAT}: upgrade"
        )
    hybrid, phi = HybridConfig.from_dict(config["hybrid"]), _read_phi(directory / PHI_FILE)
    if isinstance(base_model, WanTransformer3DModel):
        model = base_model
    else:
        model = load_transformer(base_model or config["base"]["name"], **diffusers_kwargs)
    found = fingerprint(model)
    if found != config["base"]["fingerprint"]:
        raise CheckpointError(
            f"{repo_or_dir} belongs to another base model: its φ was saved on weights of fingerprint "
            f"{config['base']['fingerprint'][:12]}… ({config['base']['name'] or 'made in memory'}), this one has "
            f"{found[:12]}…; give base_model, or save with weights='all' after fine-tuning"
        )
    convert_(model, hybrid)
    own = {name: tensor for name, tensor in model.state_dict().items() if is_phi(name)}
    wrong = sorted(own.keys() ^ phi.keys())
    wrong += sorted(name for name in own.keys() & phi.keys() if own[name].shape != phi[name].shape)
    if wrong:
        revert_(model)
        raise CheckpointError(f"{repo_or_dir}: {len(wrong)} keys missing, unexpected or misshapen, such as {wrong[0]}")
    for name, tensor in own.items():
        tensor.copy_(phi[name])
    assert isinstance(model, HybridWanTransformer3DModel)
    return model


def load_transformer(base: str | Path, **diffusers_kwargs: Any) -> WanTransformer3DModel:
    """The stock transformer of `base`: "tiny-wan", or a path or hub id of a transformer or of its pipeline."""
    source = resolve_base(base)
    if not source:
        raise CheckpointError("the base model was made in memory when this was saved; give base_model")
    folder = Path(source)
    nested = (folder / "transformer").is_dir() if folder.is_dir() else not source.endswith("transformer")
    subfolder = {"subfolder": "transformer"} if nested else {}
    return WanTransformer3DModel.from_pretrained(source, **subfolder, **diffusers_kwargs)


def _is_checkpoint(directory: Path) -> bool:
    return (directory / "config.json").exists() and "hybrid" in read_json(directory / "config.json")


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = read_json(directory / "config.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} has no readable config.json: {error}") from error
    if not isinstance(config, dict) or "hybrid" not in config:
        raise CheckpointError(f"{directory} is no hybrid checkpoint: its config.json says nothing of hybrid attention")
    return config


def _read_phi(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _replace(staging: Path, directory: Path) -> None:
    """Put `staging` where `directory` is, in two renames."""
    if directory.exists():
        old = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(directory, old)
        os.rename(staging, directory)
        shutil.rmtree(old)
    else:
        os.rename(staging, directory)
