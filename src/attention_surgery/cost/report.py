"""`profile`: where a model's FLOPs go, and what remains of them at given rates."""

import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import WanTransformer3DModel
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..errors import RateError
from ..models.wan import WanSpec, read_wan
from ..ops.tokens import Grid
from ..rates import Rate, check_rate
from .flops import BlockFlops, block_flops


@dataclass(frozen=True, kw_only=True)
class CostReport:
    """FLOPs of a transformer's blocks for one forward of one sample. `str()` of it is a table.

    Args:
        spec: the model.
        num_frames, height, width: the video, in pixels.
        grid: its tokens: frames, rows, columns.
        per_block: block index → its FLOPs, at its rate.
        dense: FLOPs of one all-softmax block.
    """

    spec: WanSpec
    num_frames: int
    height: int
    width: int
    grid: Grid
    per_block: dict[int, BlockFlops]
    dense: BlockFlops

    @property
    def tokens(self) -> int:
        """N: video tokens per sample."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def total_flops(self) -> int:
        """All blocks. Patch, time and text embeddings and the output projection are not among them."""
        return sum(block.total for block in self.per_block.values())

    @property
    def attention_share(self) -> float:
        """Part of `total_flops` that is self-attention: QKVO projections and core; in hybrid layers also φ."""
        return sum(block.attention for block in self.per_block.values()) / self.total_flops

    @property
    def core_share(self) -> float:
        """Part of `total_flops` that is self-attention without its QKVO projections."""
        return sum(block.attention - block.projections for block in self.per_block.values()) / self.total_flops

    @property
    def remaining(self) -> float:
        """`total_flops` as a part of the all-softmax model's."""
        return self.total_flops / (self.dense.total * len(self.per_block))

    def to_dict(self) -> dict[str, Any]:
        """A JSON object of all numbers."""
        return {
            "num_frames": self.num_frames,
            "height": self.height,
            "width": self.width,
            "grid": list(self.grid),
            "tokens": self.tokens,
            "total_flops": self.total_flops,
            "attention_share": self.attention_share,
            "core_share": self.core_share,
            "remaining": self.remaining,
            "per_block": {
                str(index): dataclasses.asdict(block) | {"total": block.total}
                for index, block in self.per_block.items()
            },
        }

    def __str__(self) -> str:
        size = " × ".join(map(str, (self.num_frames, self.height, self.width)))
        grid = " × ".join(map(str, self.grid))
        hybrid = any(block.rate != 1 for block in self.per_block.values())
        phi, state = (" + φ", ", linear state and its read-out") if hybrid else ("", "")
        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(self._table())
        table = [line.rstrip() for line in text.getvalue().splitlines()]
        return "\n".join(
            (
                f"{size} pixels = {grid} = {self.tokens:,} tokens, one forward of one sample",
                *table,
                f"{100 * self.attention_share:5.1f} % of these FLOPs: self-attention, QKVO projections + core{phi}",
                f"{100 * self.core_share:5.1f} % of these FLOPs: self-attention without QKVO, core{phi}",
                f"{100 * self.remaining:5.1f} % of the all-softmax blocks' FLOPs remain",
                "",
                f"Core: QKᵀ and PV{state}. 2 FLOPs per multiply-add of a matrix product.",
                "Blocks only: without embeddings, text encoder and VAE.",
            )
        )

    def _table(self) -> Table:
        scales = {1e12: "TFLOP", 1e9: "GFLOP", 1e6: "MFLOP"}
        scale = next((scale for scale in scales if self.dense.total >= scale), 1e6)
        table = Table(box=SIMPLE, title=f"{scales[scale]} per block", title_justify="left")
        for name in ("self-attention", "blocks", "QKVO", "core", "φ", "cross-attn", "FFN", "total", "% of softmax"):
            table.add_column(name, justify="left" if name == "self-attention" else "right")
        kinds: dict[Rate, list[BlockFlops]] = {}
        for block in self.per_block.values():
            kinds.setdefault(block.rate, []).append(block)
        for rate, blocks in sorted(kinds.items(), key=lambda kind: (kind[0] == "linear", kind[0])):
            one = blocks[0]
            label = {1: "softmax", "linear": "linear"}.get(rate, f"hybrid, R = {rate}")
            parts = (one.projections, one.core, one.feature_maps, one.cross_attention, one.feed_forward, one.total)
            values = (f"{part / scale:.3f}" for part in parts)
            table.add_row(label, str(len(blocks)), *values, f"{100 * one.total / self.dense.total:.1f}")
        table.add_section()
        total, remaining = f"{self.total_flops / scale:.3f}", f"{100 * self.remaining:.1f}"
        table.add_row("all blocks", str(len(self.per_block)), *[""] * 5, total, remaining)
        return table


def profile(
    model_or_config: WanSpec | WanTransformer3DModel | Mapping[str, Any] | str | Path,
    *,
    num_frames: int = 81,
    height: int = 480,
    width: int = 832,
    rates: Mapping[int, Rate] | None = None,
    degree: int = 2,
    layers: int = 2,
) -> CostReport:
    """Count the FLOPs of a Wan transformer's blocks for one forward of one sample, on meta tensors.

    Args:
        model_or_config: a model, its config, a folder or a hub id (see `read_wan`); only the config is read.
        num_frames, height, width: the video, in pixels.
        rates: block → rate; blocks that are not named keep softmax. None: the model's own rates if it is converted,
            all softmax otherwise.
        degree, layers: of φ, for `rates`; a converted model's own rates go with its own φ.

    Raises:
        ModelError: no Wan transformer.
        ConfigError: a video that does not fit the VAE's and the patches' sizes, degree or layers below 1.
        RateError: a block or rate that does not exist.
    """
    spec = read_wan(model_or_config)
    if rates is None:
        rates = {}
        if spec.hybrid is not None:
            rates, degree, layers = spec.hybrid.rates, spec.hybrid.degree, spec.hybrid.layers
    for block, rate in rates.items():
        if not isinstance(block, int) or isinstance(block, bool) or not 0 <= block < spec.blocks:
            raise RateError(
                f"block {block!r} does not exist; this model has {spec.blocks} blocks (0-{spec.blocks - 1})"
            )
        check_rate(rate)
    grid = spec.grid(num_frames, height, width)
    tokens = grid[0] * grid[1] * grid[2]
    return CostReport(
        spec=spec,
        num_frames=num_frames,
        height=height,
        width=width,
        grid=grid,
        per_block={
            block: block_flops(spec, rates.get(block, 1), tokens, degree=degree, layers=layers)
            for block in range(spec.blocks)
        },
        dense=block_flops(spec, 1, tokens),
    )
