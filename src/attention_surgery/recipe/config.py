"""The recipe's settings: one small TOML file, every entry of which is a field below."""

import dataclasses
import json
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..distillation import DistillConfig
from ..errors import ConfigError
from ..finetuning import FinetuneConfig
from ..generation import GenerateConfig
from ..rates import Rate, check_rates

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """All stages of a surgery.

    Args:
        base: a Wan pipeline in diffusers format: a folder, a hub id, or "tiny-wan" for the embedded one.
        prompts: text file of training prompts, one per line. None, for tiny-wan only: captions of the shapes world.
        videos: folder of videos with captions for fine-tuning. None, for tiny-wan only: rendered ones.
        sample_prompts: text file of prompts that teacher and student are compared on. None, for tiny-wan only: captions
            of the shapes world that no training prompt has.
        num_samples: how many of those prompts are sampled.
        rates: candidate rates of each block, beside softmax.
        budget: fraction of the all-softmax cost that may remain in the blocks.
        unit: what the budget counts, "flops" or measured "latency".
        dtype: weights and activations of the pipeline.
        device: where it runs; "auto" takes a GPU if there is one.
        distill: settings of the distillation, a table of the flags of `attention-surgery distill`.
        finetune: settings of the fine-tuning, likewise.
        generate: settings of the sampling, likewise.
    """

    base: str = "tiny-wan"
    prompts: str | None = None
    videos: str | None = None
    sample_prompts: str | None = None
    num_samples: int = 4
    rates: tuple[Rate, ...] = (2, 4, 8)  # §3.3
    budget: float = 0.6
    unit: Literal["flops", "latency"] = "flops"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: str = "auto"
    distill: DistillConfig = field(default_factory=DistillConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    def __post_init__(self) -> None:
        check_rates(self.rates)
        if not 0 < self.budget <= 1:
            raise ConfigError(
                f"budget is {self.budget}; expected a fraction of the all-softmax cost, above 0, at most 1"
            )
        if self.unit not in ("flops", "latency"):
            raise ConfigError(f"unit {self.unit!r} does not exist; expected 'flops' or 'latency'")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype {self.dtype!r} does not exist; expected 'float32' or 'bfloat16'")
        if self.num_samples < 1:
            raise ConfigError(f"num_samples is {self.num_samples}; expected at least 1")
        if self.base != "tiny-wan":
            for name in ("prompts", "videos", "sample_prompts"):
                if getattr(self, name) is None:
                    raise ConfigError(f"{name} is not set; only base='tiny-wan' makes its own: give a path")

    def to_dict(self) -> dict[str, Any]:
        """A JSON object, as it is read back from a file: lists in place of tuples."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def read_config(path: str | Path) -> RecipeConfig:
    """Read a TOML file. ConfigError naming the entry if it is unknown or of another type than its field."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is no readable TOML file: {error}") from error
    return build(RecipeConfig, values, where=str(path))


def build(cls: type[Settings], values: Mapping[str, Any], *, where: str) -> Settings:
    """Make the settings dataclass `cls` from parsed TOML, nested tables included. ConfigError names the entry."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ConfigError(f"{where}: entry {unknown[0]!r} does not exist; expected one of {sorted(hints)}")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: {name} is {value!r}; expected a table of settings")
            arguments[name] = build(typing.cast(type, hints[name]), value, where=f"{where}: [{name}]")
        else:
            arguments[name] = _checked(hints[name], value, f"{where}: {name}")
    return cls(**arguments)


def _checked(hint: Any, value: Any, where: str) -> Any:
    """`value` if its type is one that `hint` allows; lists become tuples, integers floats, where those are wanted."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, type(int | str)) else (hint,)
    for option in options:
        origin = typing.get_origin(option)
        if origin is Literal and value in typing.get_args(option):
            return value
        if origin in (tuple, list) and isinstance(value, list | tuple):
            item = typing.get_args(option)[0]
            return tuple(_checked(item, part, where) for part in value)
        if option is type(None) and value is None:
            return value
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(option, type) and origin is None and type(value) is option:
            return value
    raise ConfigError(f"{where} is {value!r}; expected {hint}")
