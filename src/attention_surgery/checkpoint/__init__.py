"""Keeping a converted model: strict checkpoints, whole or φ only, local or on the hub."""

from .hub import push_to_hub
from .store import from_pretrained, load_transformer, save_pretrained

__all__ = ["from_pretrained", "load_transformer", "push_to_hub", "save_pretrained"]
