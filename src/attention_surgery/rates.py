"""Hybrid rates: how many of the tokens keep softmax attention."""

from collections.abc import Iterable
from typing import Literal, TypeAlias, cast, get_args

from .errors import ConfigError, RateError

Rate: TypeAlias = int | Literal["linear"]
"""1: softmax attention on every token (the dense layer). R >= 2: on every R-th token. "linear": on none."""

Normalizer: TypeAlias = Literal["max", "mean"]
Pattern: TypeAlias = Literal["stride", "staggered", "lattice"]


def check_rate(rate: object) -> Rate:
    """Return `rate` if it is one. RateError otherwise."""
    if rate == "linear" or (isinstance(rate, int) and not isinstance(rate, bool) and rate >= 1):
        return cast(Rate, rate)
    raise RateError(f"rate {rate!r} does not exist; expected an integer >= 1 or 'linear'")


def check_rates(rates: Iterable[object]) -> tuple[Rate, ...]:
    """Return `rates`, each checked, none twice. RateError otherwise, also for none at all."""
    checked: tuple[Rate, ...] = tuple(check_rate(rate) for rate in rates)
    if not checked:
        raise RateError("got no rates; name at least one, for example rates=(2, 4, 8)")
    if len(set(checked)) != len(checked):
        raise RateError(f"a rate is named twice in {checked}")
    return checked


def parse_rate(text: str) -> Rate:
    """Read a rate as written in JSON keys and on the command line: "4" or "linear"."""
    return check_rate(int(text) if text.isdecimal() else text)


def check_normalizer(normalizer: str) -> Normalizer:
    """Return `normalizer` if it is one. ConfigError otherwise."""
    if normalizer not in get_args(Normalizer):
        raise ConfigError(f"normalizer {normalizer!r} does not exist; expected one of {get_args(Normalizer)}")
    return cast(Normalizer, normalizer)


def check_pattern(pattern: str) -> Pattern:
    """Return `pattern` if it is one. ConfigError otherwise."""
    if pattern not in get_args(Pattern):
        raise ConfigError(f"pattern {pattern!r} does not exist; expected one of {get_args(Pattern)}")
    return cast(Pattern, pattern)
