"""Modules: the feature map φ and the attention processor that carries two of them."""

from .feature_map import FeatureMap

__all__ = ["FeatureMap"]
