"""What a conversion does: which blocks, at which rates, with which feature map."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, RateError
from ..rates import Normalizer, Pattern, Rate, check_normalizer, check_pattern, check_rate, parse_rate

FORMAT = 1
"""Version of the JSON form. Raised whenever an older reader would misread a newer file."""


@dataclass(frozen=True)
class HybridConfig:
    """The architecture of a hybrid model (§3.2), as it stands in a checkpoint's config.

    Args:
        rates: block index → rate. Blocks at rate 1, and blocks that are not named, keep softmax attention.
        degree: P, the highest power in φ.
        layers: L, the depth of φ.
        normalizer: "mean", or "max" for Eq. 5 as the paper has it.
        pattern: which tokens keep softmax attention; "stride" is the paper's.

    Raises:
        RateError: a block or rate that cannot exist, or no block to convert.
        ConfigError: degree or layers below 1, a normalizer or pattern that does not exist.
    """

    rates: Mapping[int, Rate]
    degree: int = field(default=2, kw_only=True)  # §4: "a lightweight 2-layer MLP with degree-2 polynomial features"
    layers: int = field(default=2, kw_only=True)
    normalizer: Normalizer = field(default="mean", kw_only=True)
    pattern: Pattern = field(default="stride", kw_only=True)

    def __post_init__(self) -> None:
        rates = {}
        for block, rate in self.rates.items():
            if not isinstance(block, int) or isinstance(block, bool) or block < 0:
                raise RateError(f"block {block!r} does not exist; expected an index >= 0")
            if check_rate(rate) != 1:
                rates[block] = rate
        if not rates:
            raise RateError("no block is converted; give at least one block a rate >= 2 or 'linear'")
        for name, value in {"degree": self.degree, "layers": self.layers}.items():
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected an integer >= 1")
        check_normalizer(self.normalizer)
        check_pattern(self.pattern)
        object.__setattr__(self, "rates", dict(sorted(rates.items())))

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; `from_dict` reads it back to an equal config."""
        return {
            "format": FORMAT,
            "rates": {str(block): rate for block, rate in self.rates.items()},
            "degree": self.degree,
            "layers": self.layers,
            "normalizer": self.normalizer,
            "pattern": self.pattern,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HybridConfig":
        """Read the JSON object of `to_dict`. ConfigError for another format, or a missing or unknown entry."""
        expected = {"format", "rates", "degree", "layers", "normalizer", "pattern"}
        if not isinstance(values, Mapping) or "format" not in values:
            raise ConfigError(f"a hybrid config is a JSON object with the entries {sorted(expected)}; got {values!r}")
        if values["format"] != FORMAT:
            raise ConfigError(
                f"hybrid config of format {values['format']!r}; this version reads format {FORMAT}: "
                "upgrade attention-surgery"
            )
        if set(values) != expected:
            raise ConfigError(f"a hybrid config has the entries {sorted(expected)}; got {sorted(values)}")
        named = values["rates"]
        if not isinstance(named, Mapping) or not all(str(block).isdecimal() for block in named):
            raise ConfigError(f"the rates of a hybrid config map block numbers to rates; got {named!r}")
        rates: dict[int, Rate] = {int(block): parse_rate(str(rate)) for block, rate in named.items()}
        return cls(rates, **{name: values[name] for name in expected - {"format", "rates"}})
