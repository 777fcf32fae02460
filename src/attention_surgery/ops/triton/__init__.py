"""Hybrid attention in fused Triton kernels, forward and backward. Importing this package does not import Triton."""
