"""Compiled blocks while a model is fine-tuned."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..models import HybridWanTransformer3DModel

OPTIONS: dict[str, Any] = {"fullgraph": True, "dynamic": False}
"""Of `compile_repeated_blocks`: a graph that breaks is an error, and every shape has code of its own."""

LIMIT = 64
"""Of versions of the blocks' code: for every rate there are training, evaluation, the teacher's part and validation."""


@contextmanager
def compiled_blocks(model: HybridWanTransformer3DModel) -> Iterator[None]:
    """Within the context the blocks of `model` are compiled, those of one rate together; afterwards they are as before.

    Under several processes a block stays one piece: by default PyTorch would cut it where a bucket of gradients ends.
    """
    before = [block._compiled_call_impl for block in model.blocks]
    limit = max(LIMIT, torch._dynamo.config.recompile_limit)
    with torch._dynamo.config.patch(recompile_limit=limit, optimize_ddp=False):
        model.compile_repeated_blocks(**OPTIONS)
        try:
            yield
        finally:
            for block, call in zip(model.blocks, before, strict=True):
                block._compiled_call_impl = call
