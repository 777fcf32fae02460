"""Feature maps to compare the library's with: other non-linearities, other initial weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distillation import DistillConfig, FeatureMapBank
from ..distillation.bank import FeatureMapSpec
from ..distillation.passes import DistillationPass
from ..distillation.plan import plan_distillation
from ..distillation.trajectory import run_teacher, token_grid
from ..layers.capture import capture
from ..layers.feature_map import FeatureMap, squareplus
from ..rates import Rate
from .trial import Final, Hidden, Maps, Weights

HIDDEN: dict[Hidden, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
FINAL: dict[Final, Callable[[Tensor], Tensor]] = {
    "squareplus": squareplus,
    "softplus": F.softplus,
    "relu": F.relu,
    "elu+1": lambda x: F.elu(x) + 1,
}


class VariantMap(FeatureMap):
    """`FeatureMap` with another hidden or final non-linearity, or weights drawn as `torch.nn.Linear` draws them.

    At the natural scale the hidden layers keep unit second moments, and each power of another final non-linearity is
    scaled by a constant so that its mean is that of squareplus at the start.
    """

    def __init__(
        self, heads: int, head_dim: int, *, degree: int, layers: int, hidden: Hidden, final: Final, weights: Weights
    ) -> None:
        super().__init__(heads, head_dim, degree=degree, layers=layers)
        self.hidden, self.final = HIDDEN[hidden], FINAL[final]
        self.scales = [1.0] * degree
        if weights == "pytorch":
            for weight, bias in zip(self.weights, self.biases, strict=True):
                bound = weight.shape[1] ** -0.5
                nn.init.uniform_(weight, -bound, bound)
                nn.init.uniform_(bias, -bound, bound)
            return
        gain = math.sqrt(_mean(lambda x: F.silu(x) ** 2) / _mean(lambda x: self.hidden(x) ** 2))
        for weight in self.weights[1:]:
            weight.data.mul_(gain)
        for power in range(1, degree + 1):
            moment = 2 ** (power / 2 - 1) * math.gamma((power + 1) / 2) / math.sqrt(math.pi)
            own, other = (
                _mean(lambda x, f=f, p=power, s=moment ** (-1 / power): f(s * x) ** p) for f in (squareplus, self.final)
            )
            self.scales[power - 1] = own / other

    def forward(self, x: Tensor) -> Tensor:
        b, n, _, _ = x.shape
        y = x.permute(2, 0, 1, 3).flatten(1, 2)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = torch.baddbmm(bias[:, None], y, weight)
            y = self.hidden(y) if layer < self.layers - 1 else self.final(y)
        parts = zip(y.split(self.head_dim, -1), self.scales, strict=True)
        powers = [part**p * (scale * self.features**-0.5) for p, (part, scale) in enumerate(parts, start=1)]
        return torch.cat(powers, dim=-1).unflatten(1, (b, n)).permute(1, 2, 0, 3)


@dataclass(frozen=True, kw_only=True)
class VariantSpec(FeatureMapSpec):
    """What all maps of a bank of variants have in common."""

    hidden: Hidden
    final: Final
    weights: Weights

    def new_map(self) -> FeatureMap:
        return VariantMap(
            self.heads,
            self.head_dim,
            degree=self.degree,
            layers=self.layers,
            hidden=self.hidden,
            final=self.final,
            weights=self.weights,
        )


def distil_variant(
    pipe: Any, prompts: Sequence[str], maps: Maps, *, config: DistillConfig, folder: Path
) -> FeatureMapBank:
    """`distill` with maps of another kind: the same trajectories, updates and errors; goes on in `folder`."""
    model = pipe.transformer
    spec = VariantSpec(
        heads=model.config.num_attention_heads,
        head_dim=model.config.attention_head_dim,
        degree=maps.degree,
        layers=maps.layers,
        normalizer=maps.normalizer,
        pattern=maps.pattern,
        hidden=maps.hidden,
        final=maps.final,
        weights=maps.weights,
    )
    blocks, grid = range(len(model.blocks)), token_grid(pipe, config)
    plan = plan_distillation(
        blocks,
        maps.rates,
        config,
        tokens=math.prod(grid),
        heads=spec.heads,
        head_dim=spec.head_dim,
        element_size=model.dtype.itemsize,
    )
    bank = FeatureMapBank(spec, blocks, maps.rates, seed=config.seed)
    train, heldout = list(prompts[: -config.heldout_prompts]), list(prompts[-config.heldout_prompts :])
    for index in range(len(plan.passes)):
        DistillationPass(pipe, bank, index, plan, config, grid, folder).run(train, heldout)
    return bank


def dead_features(pipe: Any, bank: FeatureMapBank, prompt: str, *, config: DistillConfig) -> dict[Rate, float]:
    """rate → share of the features of φ_q and φ_k, over all blocks, without any gradient on a held-out trajectory.

    A feature's gradient is taken with respect to its own last bias. It is never negative, as features only grow with
    it, so that nothing cancels in the sum over tokens.
    """
    device = pipe._execution_device
    found: dict[tuple[int, Rate, int], Tensor] = {}

    def observe(block: int, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> None:
        for rate, pair in bank.pairs[block].items():
            for number, (phi, x) in enumerate(((pair.phi_q, q), (pair.phi_k, k))):
                phi.to(device)
                bias = phi.biases[-1].requires_grad_(True)
                with torch.enable_grad():
                    (gradient,) = torch.autograd.grad(phi(x).sum(), bias)
                key = (block, rate, number)
                found[key] = found[key] + gradient if key in found else gradient

    with capture(pipe.transformer, bank.blocks, observe):
        run_teacher(pipe, [prompt], seed=config.seed, config=config, on_step_end=lambda step: None)
    for row in bank.pairs.values():
        for pair in row.values():
            pair.to("cpu").requires_grad_(False)
    return {
        rate: float(torch.cat([(g == 0).float().flatten() for (_, r, _), g in found.items() if r == rate]).mean())
        for rate in bank.rates
    }


def _mean(function: Callable[[Tensor], Tensor]) -> float:
    """Of `function` over a standard normal variable, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    values = function(torch.from_numpy(nodes)).numpy()
    return float(values @ weights / weights.sum())
