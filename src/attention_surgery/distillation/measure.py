"""e_ir: how far a bank's hybrid attention is from the teacher's, on the teacher's own trajectories."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..files import digest
from ..layers.capture import capture
from ..ops import hybrid_attention
from ..ops.hybrid import Backend
from ..ops.tokens import Grid
from ..rates import Rate
from .bank import FeatureMapBank, FeatureMapPair, FeatureMapSpec
from .config import DistillConfig
from .losses import relative_error
from .trajectory import run_teacher, token_grid

Item = tuple[Tensor, Tensor, Tensor, Tensor]
"""q, k, v, y of one block in one teacher forward, each b n h d."""


def measure_errors(
    pipe: Any, bank: FeatureMapBank, prompts: Sequence[str], *, config: DistillConfig
) -> dict[int, dict[Rate, float]]:
    """block → rate → e_ir of `bank` on trajectories of `prompts`, at any shape: `config` need not be the bank's own.

    Args:
        pipe: a `WanPipeline` with the stock transformer that the bank was distilled from.
        bank: of `distill`.
        prompts: one trajectory each.
        config: shape, steps, guidance and seed of the trajectories; normalizer and pattern are the bank's.
    """
    errors: dict[str, list[float]] = {}
    pairs = [pair for row in bank.pairs.values() for pair in row.values()]
    for pair in pairs:
        pair.to(pipe._execution_device)
    for number, prompt in enumerate(prompts):
        seed = int(digest([config.seed, "measure", number])[:12], 16)
        found = trajectory_errors(
            pipe, bank, bank.blocks, [prompt], seed=seed, config=config, grid=token_grid(pipe, config)
        )
        for key, values in found.items():
            errors.setdefault(key, []).extend(values)
    for pair in pairs:
        pair.to("cpu")
    return mean_errors(errors, bank.blocks, bank.rates)


def mean_errors(
    errors: Mapping[str, Sequence[float]], blocks: Sequence[int], rates: Sequence[Rate]
) -> dict[int, dict[Rate, float]]:
    """e_ir: the mean over held-out prompts and denoising steps, block → rate."""
    return {
        block: {rate: sum(errors[f"{block}/{rate}"]) / len(errors[f"{block}/{rate}"]) for rate in rates}
        for block in blocks
    }


@torch.no_grad()
def trajectory_errors(
    pipe: Any,
    bank: FeatureMapBank,
    blocks: Sequence[int],
    prompts: list[str],
    *,
    seed: int,
    config: DistillConfig,
    grid: Grid,
) -> dict[str, list[float]]:
    """ "block/rate" → the relative error at every forward of one teacher trajectory of `prompts`."""
    errors: dict[str, list[float]] = {f"{block}/{rate}": [] for block in blocks for rate in bank.pairs[block]}

    def measure(block: int, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> None:
        for rate, pair in bank.pairs[block].items():
            error = relative_error(y, student(bank.spec, pair, rate, (q, k, v, y), grid, config.backend))
            errors[f"{block}/{rate}"].append(error.item())

    with capture(pipe.transformer, blocks, measure):
        run_teacher(pipe, prompts, seed=seed, config=config, on_step_end=lambda step: None)
    return errors


def student(spec: FeatureMapSpec, pair: FeatureMapPair, rate: Rate, item: Item, grid: Grid, backend: Backend) -> Tensor:
    """What a block's hybrid attention makes of the teacher's q, k and v."""
    q, k, v, _ = item
    return hybrid_attention(
        q,
        k,
        v,
        pair.phi_q,
        pair.phi_k,
        rate=rate,
        normalizer=spec.normalizer,
        pattern=spec.pattern,
        grid=grid,
        backend=backend,
    )
