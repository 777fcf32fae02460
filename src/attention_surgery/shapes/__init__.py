"""A small world of moving shapes: clips with captions, and an exact judge that reads clips back from pixels."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .captions import VOCABULARY as VOCABULARY
    from .captions import parse as parse
    from .drawing import Clip as Clip
    from .drawing import render as render
    from .folder import write as write
    from .judging import judge as judge
    from .reading import read as read
    from .world import FPS as FPS
    from .world import FRAMES as FRAMES
    from .world import HEIGHT as HEIGHT
    from .world import WIDTH as WIDTH
    from .world import Scene as Scene
    from .world import Thing as Thing
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        captions=["VOCABULARY", "parse"],
        drawing=["Clip", "render"],
        folder=["write"],
        judging=["judge"],
        reading=["read"],
        world=["FPS", "FRAMES", "HEIGHT", "WIDTH", "Scene", "Thing"],
    )
