"""The result of distillation: a pair of feature maps for every block and rate, with its held-out error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError, ModelError, RateError
from ..files import read_json, write_json, write_tensors
from ..layers.feature_map import FeatureMap
from ..models import HybridConfig, hybrid_processors
from ..rates import Normalizer, Pattern, Rate, parse_rate

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class FeatureMapSpec:
    """What all feature maps of a bank have in common."""

    heads: int
    head_dim: int
    degree: int
    layers: int
    normalizer: Normalizer
    pattern: Pattern

    def new_map(self) -> FeatureMap:
        """A freshly drawn φ."""
        return FeatureMap(self.heads, self.head_dim, degree=self.degree, layers=self.layers)


class FeatureMapPair(nn.Module):
    """φ_q and φ_k of one block at one rate."""

    def __init__(self, spec: FeatureMapSpec) -> None:
        super().__init__()
        self.phi_q, self.phi_k = spec.new_map(), spec.new_map()


class FeatureMapBank:
    """Distilled feature maps of many blocks at many rates, of which `load_into_` picks what a model's rates ask for.

    Attributes:
        spec: sizes, normalizer and pattern that the maps were trained with.
        pairs: block → rate → `FeatureMapPair`.
        errors: block → rate → e_ir, the relative L1 error on held-out prompts (`distillation.losses.relative_error`).
        provenance: how the bank was made, for model cards and reports.
    """

    def __init__(
        self,
        spec: FeatureMapSpec,
        blocks: Sequence[int],
        rates: Sequence[Rate],
        *,
        seed: int = 0,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.spec = spec
        self.pairs: dict[int, dict[Rate, FeatureMapPair]] = {
            block: {rate: _draw(spec, seed, block, index) for index, rate in enumerate(rates)} for block in blocks
        }
        self.errors: dict[int, dict[Rate, float]] = {}
        self.provenance = dict(provenance or {})

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that have maps, ascending."""
        return tuple(sorted(self.pairs))

    @property
    def rates(self) -> tuple[Rate, ...]:
        """The rates that every block has maps for."""
        return tuple(next(iter(self.pairs.values())))

    def hybrid_config(self, rates: Mapping[int, Rate]) -> HybridConfig:
        """The configuration that converts a model to `rates` with the sizes, normalizer and pattern of this bank."""
        self._check(rates)
        return HybridConfig(
            rates,
            degree=self.spec.degree,
            layers=self.spec.layers,
            normalizer=self.spec.normalizer,
            pattern=self.spec.pattern,
        )

    def load_into_(self, model: WanTransformer3DModel) -> None:
        """Copy the map of each converted block's rate into `model`, in place.

        Raises:
            ModelError: `model` is not converted, or was with other sizes, normalizer or pattern.
            RateError: a block or rate of the model that the bank lacks. Nothing is changed then.
        """
        processors = hybrid_processors(model)
        if not processors:
            raise ModelError(f"{type(model).__name__} has no hybrid layer; convert_ it with this bank's hybrid_config")
        for block, processor in processors.items():
            phi = processor.phi_q
            got = FeatureMapSpec(
                heads=phi.heads,
                head_dim=phi.head_dim,
                degree=phi.degree,
                layers=phi.layers,
                normalizer=processor.normalizer,
                pattern=processor.pattern,
            )
            if got != self.spec:
                raise ModelError(f"block {block} was converted with {got}; this bank was distilled with {self.spec}")
        self._check({block: processor.rate for block, processor in processors.items()})
        for block, processor in processors.items():
            pair = self.pairs[block][processor.rate]
            processor.phi_q.load_state_dict(pair.phi_q.state_dict())
            processor.phi_k.load_state_dict(pair.phi_k.state_dict())

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `bank.json` and `bank.safetensors`."""
        directory = Path(directory)
        tensors = self._tensors()
        write_tensors(directory / "bank.safetensors", tensors, {"format": str(FORMAT)})
        write_json(
            directory / "bank.json",
            {
                "format": FORMAT,
                "spec": vars(self.spec),
                "blocks": list(self.pairs),
                "rates": list(self.rates),
                "errors": {str(b): {str(r): e for r, e in row.items()} for b, row in self.errors.items()},
                "provenance": self.provenance,
            },
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read what `save_pretrained` wrote. CheckpointError if it is missing, damaged, newer, or not whole."""
        directory = Path(directory)
        try:
            description = read_json(directory / "bank.json")
            with safe_open(directory / "bank.safetensors", "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{directory} is no readable bank of feature maps: {error}") from error
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise CheckpointError(f"{directory} is a bank of another format than {FORMAT}: upgrade attention-surgery")
        bank = cls(
            FeatureMapSpec(**description["spec"]),
            description["blocks"],
            [parse_rate(str(rate)) for rate in description["rates"]],
            provenance=description["provenance"],
        )
        own = bank._tensors()
        wrong = sorted(own.keys() ^ tensors.keys())
        wrong += sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
        if wrong:
            raise CheckpointError(f"{directory}/bank.safetensors: {len(wrong)} missing, extra or misshapen: {wrong[0]}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        bank.errors = {
            int(block): {parse_rate(rate): error for rate, error in row.items()}
            for block, row in description["errors"].items()
        }
        return bank

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"blocks.{block}.rate_{rate}.{name}": tensor
            for block, row in self.pairs.items()
            for rate, pair in row.items()
            for name, tensor in pair.state_dict().items()
        }

    def _check(self, rates: Mapping[int, Rate]) -> None:
        for block, rate in rates.items():
            if rate != 1 and rate not in self.pairs.get(block, {}):
                raise RateError(
                    f"this bank has no map for block {block} at rate {rate!r}; it has blocks {list(self.blocks)} "
                    f"at rates {list(self.rates)}"
                )


def _draw(spec: FeatureMapSpec, seed: int, block: int, index: int) -> FeatureMapPair:
    """A pair whose weights depend on (seed, block, rate) only, not on what else is drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed * 1009 + block) * 1009 + index)
        return FeatureMapPair(spec)
