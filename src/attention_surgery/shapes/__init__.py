"""A small world of moving shapes: clips with captions, and an exact judge that reads clips back from pixels."""

from .captions import VOCABULARY, parse
from .drawing import Clip, render
from .folder import write
from .judging import judge
from .reading import read
from .world import FPS, FRAMES, HEIGHT, WIDTH, Scene, Thing

__all__ = [
    "FPS",
    "FRAMES",
    "HEIGHT",
    "VOCABULARY",
    "WIDTH",
    "Clip",
    "Scene",
    "Thing",
    "judge",
    "parse",
    "read",
    "render",
    "write",
]
