"""What a model costs: FLOPs counted on the meta device, latency measured on the device at hand. No weights are read."""

from .blocks import block_costs
from .flops import BlockFlops
from .latency import LatencyConfig
from .report import CostReport, profile

__all__ = ["BlockFlops", "CostReport", "LatencyConfig", "block_costs", "profile"]
