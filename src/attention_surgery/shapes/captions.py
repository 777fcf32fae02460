"""The grammar of captions: how a scene is said, in many wordings, and how a caption is read back."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from ..errors import DataError
from .world import (
    BACKGROUNDS,
    MOTIONS,
    PAIR_MOTIONS,
    RELATIONS,
    Background,
    Color,
    Motion,
    Relation,
    Scene,
    Shape,
    Size,
    Thing,
)

_T = TypeVar("_T")

_SHAPE_WORDS: dict[Shape, tuple[str, ...]] = {
    "circle": ("circle", "disk"),
    "square": ("square",),
    "triangle": ("triangle",),
    "cross": ("cross", "plus"),
}
_COLOR_WORDS: dict[Color, tuple[str, ...]] = {
    "red": ("red",),
    "yellow": ("yellow",),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple",),
    "white": ("white",),
}
_SIZE_WORDS: dict[Size, tuple[str, ...]] = {"small": ("small", "little"), "large": ("large", "big")}
_BACKGROUND_WORDS: dict[Background, tuple[str, ...]] = {
    "plain": ("plain",),
    "gradient": ("gradient",),
    "striped": ("striped",),
    "checkered": ("checkered",),
}
_RELATION_PHRASES: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_DIRECTION_PHRASES: dict[Motion, tuple[str, ...]] = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upward"),
    "down": ("down", "downward"),
}
# Each verb as "it ...", "they ..." and "a video of it ...".
_TRAVEL = (("moves", "move", "moving"), ("slides", "slide", "sliding"), ("drifts", "drift", "drifting"))
_VERBS: dict[Motion, tuple[tuple[str, str, str], ...]] = {
    **{
        motion: tuple(
            (f"{one} {phrase}", f"{many} {phrase}", f"{being} {phrase}")
            for one, many, being in _TRAVEL
            for phrase in phrases
        )
        for motion, phrases in _DIRECTION_PHRASES.items()
    },
    "bounce": (
        ("bounces", "bounce", "bouncing"),
        ("bounces up and down", "bounce up and down", "bouncing up and down"),
    ),
    "rotate": (("rotates", "rotate", "rotating"), ("spins", "spin", "spinning"), ("turns", "turn", "turning")),
    "grow": (("grows", "grow", "growing"), ("gets bigger", "get bigger", "getting bigger")),
    "stay": (
        ("stays still", "stay still", "staying still"),
        ("rests", "rest", "resting"),
        ("does not move", "do not move", "not moving"),
    ),
}
_ONE, _MANY, _BEING = range(3)  # which form of the verb a sentence takes

_GROUNDS = ("background", "backdrop")
_SENTENCES_ONE = (
    (_ONE, "a {first} {motion} on a {background}"),
    (_ONE, "on a {background} a {first} {motion}"),
    (_BEING, "a video of a {first} {motion} on a {background}"),
    (_BEING, "there is a {first} {motion} on a {background}"),
)
_SENTENCES_TWO = (
    (_MANY, "a {first} is {relation} a {second} and both {motion} on a {background}"),
    (_MANY, "on a {background} a {first} is {relation} a {second} and they {motion}"),
    (_BEING, "a video of a {first} {relation} a {second} both {motion} on a {background}"),
    (_BEING, "there is a {first} {relation} a {second} both {motion} on a {background}"),
)
_EXAMPLE = "a small red circle moves left on a plain background"


def say(scene: Scene, rng: np.random.Generator) -> str:
    """Word a scene as a caption: lower case, no punctuation, every fact stated."""

    def pick(values: tuple[str, ...]) -> str:
        return values[int(rng.integers(len(values)))]

    def name(thing: Thing) -> str:
        return f"{pick(_COLOR_WORDS[thing.color])} {pick(_SHAPE_WORDS[thing.shape])}"

    sentences = _SENTENCES_ONE if scene.relation is None else _SENTENCES_TWO
    form, sentence = sentences[int(rng.integers(len(sentences)))]
    first = name(scene.things[0])
    return sentence.format(
        first=first if scene.size is None else f"{pick(_SIZE_WORDS[scene.size])} {first}",
        second="" if scene.relation is None else name(scene.things[1]),
        relation="" if scene.relation is None else pick(_RELATION_PHRASES[scene.relation]),
        motion=pick(tuple(forms[form] for forms in _VERBS[scene.motion])),
        background=f"{pick(_BACKGROUND_WORDS[scene.background])} {pick(_GROUNDS)}",
    )


def parse(caption: str) -> Scene:
    """Read the facts that a caption states. Case, commas and full stops do not matter.

    Raises:
        DataError: a word that the grammar does not know (named), words that make no sentence of it, or a scene that
            the world never shows.
    """
    if not isinstance(caption, str):
        raise DataError(f"a caption is a string; got {type(caption).__name__}")
    words = re.findall(r"[^\s,.]+", caption.lower())
    for word in words:
        if word not in VOCABULARY:
            raise DataError(
                f"the caption {caption!r} says {word!r}, a word that the small world does not know; "
                f"the {len(VOCABULARY)} that it knows are shapes.VOCABULARY, for example {_EXAMPLE!r}"
            )
    text = " ".join(words)
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            return _scene(match.groupdict())
    raise DataError(
        f"the caption {caption!r} is no sentence of the small world's grammar, though it knows every word; "
        f"say it like {_EXAMPLE!r} or 'a red circle is above a blue square and both move left on a plain background'"
    )


def _scene(said: dict[str, str | None]) -> Scene:
    def thing(which: str) -> Thing:
        shape: Shape = _meaning(_SHAPE_WORDS, said[f"{which}_shape"])
        color: Color = _meaning(_COLOR_WORDS, said[f"{which}_color"])
        return Thing(shape=shape, color=color)

    motion: Motion = next(name for name in MOTIONS if any(said["motion"] in forms for forms in _VERBS[name]))
    background: Background = _meaning(_BACKGROUND_WORDS, said["background"])
    size: Size | None = _meaning(_SIZE_WORDS, said["size"]) if said.get("size") else None
    relation: Relation | None = _meaning(_RELATION_PHRASES, said["relation"]) if said.get("relation") else None
    things = (thing("first"),) if relation is None else (thing("first"), thing("second"))
    return Scene(things=things, motion=motion, background=background, size=size, relation=relation)


def _meaning(table: Mapping[_T, tuple[str, ...]], phrase: str | None) -> _T:
    return next(value for value, phrases in table.items() if phrase in phrases)


def _one_of(phrases: Iterable[str]) -> str:
    return "|".join(sorted(phrases, key=len, reverse=True))


def _pattern(form: int, sentence: str) -> re.Pattern[str]:
    def any_of(group: str, table: Mapping[Any, tuple[str, ...]]) -> str:
        return f"(?P<{group}>{_one_of(phrase for phrases in table.values() for phrase in phrases)})"

    verbs = _one_of(forms[form] for motion in MOTIONS for forms in _VERBS[motion])
    return re.compile(
        sentence.format(
            first=f"(?:{any_of('size', _SIZE_WORDS)} )?"
            + f"{any_of('first_color', _COLOR_WORDS)} {any_of('first_shape', _SHAPE_WORDS)}",
            second=f"{any_of('second_color', _COLOR_WORDS)} {any_of('second_shape', _SHAPE_WORDS)}",
            relation=any_of("relation", _RELATION_PHRASES),
            motion=f"(?P<motion>{verbs})",
            background=f"{any_of('background', _BACKGROUND_WORDS)} (?:{_one_of(_GROUNDS)})",
        )
    )


_PATTERNS = tuple(_pattern(form, sentence) for form, sentence in _SENTENCES_ONE + _SENTENCES_TWO)

_PHRASES = (
    *(re.sub(r"\{\w+\}", " ", sentence) for _, sentence in _SENTENCES_ONE + _SENTENCES_TWO),
    *_GROUNDS,
    *(word for table in (_SHAPE_WORDS, _COLOR_WORDS, _SIZE_WORDS) for words in table.values() for word in words),
    *(phrase for kind in BACKGROUNDS for phrase in _BACKGROUND_WORDS[kind]),
    *(phrase for relation in RELATIONS for phrase in _RELATION_PHRASES[relation]),
    *(
        forms[form]
        for motion in MOTIONS
        for forms in _VERBS[motion]
        for form in (_ONE, _MANY, _BEING)
        if form != _MANY or motion in PAIR_MOTIONS
    ),
)
VOCABULARY: tuple[str, ...] = tuple(sorted({word for phrase in _PHRASES for word in phrase.split()}))
"""Every word that a caption can hold, sorted."""
