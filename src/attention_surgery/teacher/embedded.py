"""Where the embedded pipeline lies."""

from pathlib import Path

from ..errors import CheckpointError

EMBEDDED = Path(__file__).parent / "tiny-wan"


def tiny_wan() -> Path:
    """The folder of the embedded `WanPipeline`, for `WanPipeline.from_pretrained`. CheckpointError if it is absent."""
    if not (EMBEDDED / "model_index.json").exists():
        raise CheckpointError(f"{EMBEDDED} holds no pipeline; reinstall attention-surgery, or train one: see its docs")
    return EMBEDDED
