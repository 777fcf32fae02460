"""Which base model a φ-only checkpoint belongs to."""

import hashlib
import json

import torch
from diffusers import WanTransformer3DModel

SAMPLES = 16


def base_state(model: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    """The weights that `convert_` left alone: all but φ."""
    return {name: tensor for name, tensor in model.state_dict().items() if not is_phi(name)}


def is_phi(name: str) -> bool:
    """Whether a key of the state dict belongs to a feature map."""
    return ".attn1.processor." in name


@torch.no_grad()
def fingerprint(model: WanTransformer3DModel) -> str:
    """SHA-256 over the name, shape and 16 evenly spaced values of every base weight, the values rounded to bfloat16.

    So the float32 and the bfloat16 load of one checkpoint have the same fingerprint, and a fine-tuned one has another.
    """
    hasher = hashlib.sha256()
    for name, tensor in sorted(base_state(model).items()):
        flat = tensor.detach().flatten()
        positions = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        values = flat[positions.to(flat.device)].to("cpu", torch.bfloat16).float().tolist()
        hasher.update(json.dumps([name, list(tensor.shape), values]).encode())
    return hasher.hexdigest()


def base_name(model: WanTransformer3DModel) -> str:
    """Where the base weights were loaded from, as diffusers recorded it; empty if they were made in memory."""
    return str(model.config.get("_name_or_path") or "")
