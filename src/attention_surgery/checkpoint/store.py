"""`save_pretrained` and `from_pretrained`: hybrid checkpoints, whole or φ only, strict both ways."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, ConfigError, ModelError
from ..files import read_json, write_json, write_tensors, write_text
from ..layers.processor import HybridAttnProcessor
from ..models import HybridConfig, HybridWanTransformer3DModel, convert_
from ..pipelines import resolve_base
from .card import model_card
from .folder import replaced
from .identity import base_identity, differences, is_phi

PHI_FILE = "phi.safetensors"
PHI_FORMAT = 1
Weights = Literal["all", "phi"]
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def save_pretrained(
    model: WanTransformer3DModel,
    directory: str | Path,
    *,
    weights: Weights = "all",
    max_shard_size: int | str = "10GB",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a hybrid checkpoint with a model card; the directory is whole afterwards, or as it was before.

    Args:
        model: a converted model.
        directory: a new one, an empty one, or an earlier hybrid checkpoint, which is replaced.
        weights: "all" for every weight (diffusers' layout), "phi" for the feature maps only, together with the
            identity of the base weights that the model has now (name, config, fingerprints).
        max_shard_size: of one file of weights, for "all".
        provenance: how the model was made, for the card; a JSON object. Its entries "errors" (block → rate → error)
            and "cost" (fraction of the all-softmax cost) are shown as such, the rest as JSON.

    Raises:
        ModelError: `model` is not converted, carries adapters or fused projections, or ("phi") is quantised.
        ConfigError: another value of `weights`.
        CheckpointError: `directory` holds something else, or cannot be written.
    """
    if not isinstance(model, HybridWanTransformer3DModel):
        raise ModelError(f"cannot save a {type(model).__name__} as a hybrid checkpoint: convert_ it first")
    if weights not in ("all", "phi"):
        raise ConfigError(f"weights={weights!r} does not exist; expected 'all' or 'phi'")
    if model._hf_peft_config_loaded:
        raise ModelError(
            f"cannot save a model that carries adapters ({', '.join(model.peft_config)}): call fuse_lora() and "
            "unload_lora_weights() on the pipeline first, or only the latter to drop them"
        )
    if any(module.fused_projections for module in model.modules() if isinstance(module, WanAttention)):
        raise ModelError("cannot save a model whose projections are fused: call unfuse_qkv_projections() on it first")
    card = model_card(model, weights=weights, provenance=provenance or {})
    with replaced(directory) as staging:
        if weights == "all":
            model.save_pretrained(staging, max_shard_size=max_shard_size)
        else:
            config = {
                "phi_format": PHI_FORMAT,
                "hybrid": model.hybrid_config.to_dict(),
                "base": base_identity(model),
            }
            write_json(staging / "config.json", config)
            write_tensors(staging / PHI_FILE, {k: v for k, v in model.state_dict().items() if is_phi(k)})
        write_text(staging / "README.md", card)


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
        diffusers_kwargs: passed to diffusers' `from_pretrained` (dtype, …). revision is that of `repo_or_dir`.

    Raises:
        CheckpointError: a missing, unexpected or wrongly shaped key; a damaged file; a newer format; a base model whose
            config or weights are not those that the feature maps were saved with. A given `base_model` is unchanged.
        ModelError: `base_model` is converted already, or no Wan transformer.
        ConfigError: options that have no use here.
    """
    hub = {name: diffusers_kwargs.pop(name) for name in HUB_OPTIONS if name in diffusers_kwargs}
    directory = _locate(repo_or_dir, hub)
    config, hybrid = _read_config(directory)
    if not (directory / PHI_FILE).exists():
        if "phi_format" in config:
            raise CheckpointError(f"{repo_or_dir} holds the config of feature maps, but no {PHI_FILE}")
        if base_model is not None:
            raise ConfigError(f"{repo_or_dir} holds all weights; base_model is for φ-only checkpoints")
        try:
            model = HybridWanTransformer3DModel.from_pretrained(directory, **diffusers_kwargs)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{repo_or_dir} cannot be loaded as a hybrid checkpoint: {error}") from error
        model.register_to_config(_name_or_path=config.get("_name_or_path", ""))  # still that of the base model
        return model

    phi = _read_phi(directory / PHI_FILE)
    if isinstance(base_model, WanTransformer3DModel):
        if diffusers_kwargs:
            raise ConfigError(f"{sorted(diffusers_kwargs)} have no effect on a base_model that is loaded already")
        model = base_model
        if isinstance(model, HybridWanTransformer3DModel):
            raise ModelError("base_model is converted already; revert_ it first")
    elif base_model is None or isinstance(base_model, str | Path):
        options = {name: value for name, value in hub.items() if name != "revision"} | diffusers_kwargs
        model = load_transformer(base_model or config["base"]["name"], **options)
    else:
        raise ModelError(f"base_model is a {type(base_model).__name__}; expected a transformer, a path or a hub id")
    if found := differences(config["base"], base_identity(model)):
        half = "; weights loaded in float16 cannot be compared, load float32 or bfloat16"
        raise CheckpointError(
            f"{repo_or_dir} belongs to another base model ({config['base']['name'] or 'made in memory'}) than the one "
            f"given: {found}{half if model.dtype == torch.float16 else ''}. Give its own as base_model; a model whose "
            "base weights were fine-tuned is kept with weights='all'"
        )
    _check_phi(phi, hybrid, model, repo_or_dir)
    convert_(model, hybrid)
    assert isinstance(model, HybridWanTransformer3DModel)
    own = model.state_dict()
    for name, tensor in phi.items():
        own[name].copy_(tensor)
    return model


def load_transformer(base: str | Path, **diffusers_kwargs: Any) -> WanTransformer3DModel:
    """The stock transformer of `base`: "tiny-wan", or a path or hub id of a transformer or of its pipeline.

    Raises:
        ModelError: there is none. CheckpointError: `base` is empty, as recorded of models made in memory.
    """
    source = resolve_base(base)
    if not source:
        raise CheckpointError("the base model was made in memory when this was saved; give base_model")
    folder = Path(source)
    nested = (folder / "transformer").is_dir() if folder.is_dir() else not source.endswith("transformer")
    subfolder = {"subfolder": "transformer"} if nested else {}
    try:
        return WanTransformer3DModel.from_pretrained(source, **subfolder, **diffusers_kwargs)
    except OSError as error:
        raise ModelError(f"{source} cannot be loaded as a Wan transformer or its pipeline: {error}") from error


def _locate(repo_or_dir: str | Path, options: Mapping[str, Any]) -> Path:
    if Path(repo_or_dir).is_dir():
        return Path(repo_or_dir)
    try:
        return Path(snapshot_download(str(repo_or_dir), **options))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise CheckpointError(f"{repo_or_dir} is no directory, and no hub repository was found: {error}") from error


def _read_config(directory: Path) -> tuple[dict[str, Any], HybridConfig]:
    try:
        config = read_json(directory / "config.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} has no readable config.json: {error}") from error
    if not isinstance(config, dict) or "hybrid" not in config:
        raise CheckpointError(f"{directory} is no hybrid checkpoint: its config.json says nothing of hybrid attention")
    if config.get("phi_format", PHI_FORMAT) != PHI_FORMAT:
        raise CheckpointError(
            f"{directory} has φ format {config['phi_format']!r}; this version reads format {PHI_FORMAT}: "
            "upgrade attention-surgery"
        )
    if "phi_format" in config and set(config.get("base", ())) != {"name", "config", "weights"}:
        raise CheckpointError(f"{directory}/config.json does not say which base model its feature maps belong to")
    try:
        return config, HybridConfig.from_dict(config["hybrid"])
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from error


def _read_phi(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _check_phi(
    phi: Mapping[str, torch.Tensor], hybrid: HybridConfig, model: WanTransformer3DModel, where: str | Path
) -> None:
    """CheckpointError unless `phi` holds exactly the feature maps that `hybrid` gives `model`."""
    heads, head_dim = model.config["num_attention_heads"], model.config["attention_head_dim"]
    with torch.device("meta"):
        processor = HybridAttnProcessor(heads, head_dim, rate="linear", degree=hybrid.degree, layers=hybrid.layers)
    shapes = {name: tensor.shape for name, tensor in processor.state_dict().items()}
    expected = {
        f"blocks.{block}.attn1.processor.{name}": shape for block in hybrid.rates for name, shape in shapes.items()
    }
    faults = {
        "missing": sorted(expected.keys() - phi.keys()),
        "unexpected": sorted(phi.keys() - expected.keys()),
        "misshapen": sorted(name for name in expected.keys() & phi.keys() if phi[name].shape != expected[name]),
    }
    found = [f"{len(names)} {what} keys, the first {names[0]}" for what, names in faults.items() if names]
    if found:
        raise CheckpointError(f"{where}/{PHI_FILE} does not fit its own config: {'; '.join(found)}")
