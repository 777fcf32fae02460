"""tiny-wan: the embedded small Wan pipeline, and how it is trained."""

from .embedded import tiny_wan

__all__ = ["tiny_wan"]
