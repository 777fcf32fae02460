"""Which base model a φ-only checkpoint belongs to: its name, its config and the fingerprints of its weights."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from ..errors import ModelError
from ..files import digest

SAMPLES = 16


def is_phi(name: str) -> bool:
    """Whether a key of the state dict belongs to a feature map."""
    return ".attn1.processor." in name


def base_name(model: WanTransformer3DModel) -> str:
    """Where the base weights were loaded from, as diffusers recorded it; empty if they were made in memory."""
    return str(model.config.get("_name_or_path") or "")


def base_identity(model: WanTransformer3DModel) -> dict[str, Any]:
    """What is recorded of the model's current base weights, as a JSON object: name, config, weights."""
    config = {name: value for name, value in model.config.items() if name != "hybrid" and not name.startswith("_")}
    return {"name": base_name(model), "config": json.loads(json.dumps(config)), "weights": fingerprints(model)}


@torch.no_grad()
def fingerprints(model: WanTransformer3DModel) -> dict[str, str]:
    """Part of the model ("blocks.0", "proj_out", …) → SHA-256 of its base weights, φ left out; 16 hex digits.

    Hashed are each tensor's name, its shape and 16 evenly spaced values, rounded to bfloat16: the float32 and the
    bfloat16 load of one checkpoint agree, and fine-tuning or a fused LoRA, which move every value, show. A single
    changed value may not; float16 and quantised loads have other values, and so other fingerprints.

    Raises:
        ModelError: a weight is quantised, or is on the meta device.
    """
    hashers: dict[str, Any] = {}
    for name, tensor in sorted(model.state_dict().items()):
        if is_phi(name):
            continue
        if not _is_plain(tensor):
            raise ModelError(
                f"{name} is a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}: no weights to fingerprint; "
                "load and save feature maps before quantising"
            )
        part = ".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])
        entry = [name, list(tensor.shape), _values(tensor)]
        hashers.setdefault(part, hashlib.sha256()).update(json.dumps(entry).encode())
    return {part: hasher.hexdigest()[:16] for part, hasher in hashers.items()}


@torch.no_grad()
def weights_digest(model: WanTransformer3DModel) -> str:
    """Tells a run that goes on whether it was given the model that it began with: all weights, φ too, sampled as above.

    Of quantised and offloaded weights only names and shapes count.
    """
    return digest(
        [
            [name, list(tensor.shape), _values(tensor) if _is_plain(tensor) else None]
            for name, tensor in sorted(model.state_dict().items())
        ]
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and tensor.dtype.is_floating_point and not tensor.is_meta


def _values(tensor: torch.Tensor) -> list[float]:
    flat = tensor.flatten()
    positions = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    return flat[positions.to(flat.device)].to("cpu", torch.bfloat16).float().tolist()


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What differs between two identities, in words; empty if they are the same base model.

    Names do not count, nor config entries that only one of them has: another version of diffusers may have added one.
    """
    old, new = expected["config"], found["config"]
    faults = [
        f"{name} is {new[name]!r}, expected {old[name]!r}" for name in old if name in new and old[name] != new[name]
    ]
    old, new = expected["weights"], found["weights"]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if names:
        listed = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        faults.append(f"the weights of {listed} differ ({len(names)} of {len(old)} parts)")
    return "; ".join(faults)
