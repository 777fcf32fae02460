"""The model card of a hybrid checkpoint, and the code with which `AutoModel` loads it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models import HybridWanTransformer3DModel
from .identity import base_name

CLASS_NAME = HybridWanTransformer3DModel.__name__
REMOTE_MODULE = "modeling_hybrid_wan"
REMOTE_CODE = '''"""Loads this checkpoint through attention-surgery: pip install attention-surgery"""

try:
    from attention_surgery import HybridWanTransformer3DModel
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "this checkpoint has hybrid attention layers, which need attention-surgery: pip install attention-surgery"
    ) from error

__all__ = ["HybridWanTransformer3DModel"]
'''


def model_card(
    model: HybridWanTransformer3DModel, *, weights: str, provenance: Mapping[str, Any], repo_id: str = "THIS_REPO"
) -> str:
    """Markdown: which blocks are hybrid at which rates, with their errors and the cost where `provenance` has them.

    The base model is named if its name is a hub id; of a path of the machine at hand only the last part is shown.
    """
    config = model.hybrid_config
    errors: Mapping[str, Mapping[str, float]] = provenance.get("errors", {})
    rows = []
    for block in range(len(model.blocks)):
        rate = config.rates.get(block, 1)
        error = errors.get(str(block), {}).get(str(rate))
        name = "softmax" if rate == 1 else "linear" if rate == "linear" else f"R = {rate}"
        rows.append(f"| {block} | {name} | {'' if error is None else f'{error:.4f}'} |")
    from_image = model.config["image_dim"] is not None
    base = base_name(model) if re.fullmatch(r"[\w.-]+/[\w.-]+", base_name(model)) else ""
    cost = provenance.get("cost")
    rest = _without_folders({key: value for key, value in provenance.items() if key not in ("errors", "cost")})
    made = f"\n## How it was made\n\n```json\n{json.dumps(rest, indent=2)}\n```\n" if rest else ""
    costs = "" if cost is None else f" The blocks keep {100 * cost:.1f} % of their all-softmax cost."
    holds = "all weights" if weights == "all" else "the feature maps only; the base model is loaded with them"
    pipeline = "WanImageToVideoPipeline" if from_image else "WanPipeline"
    return f"""---
library_name: diffusers
pipeline_tag: {"image-to-video" if from_image else "text-to-video"}
{f"base_model: {base}{chr(10)}" if base else ""}tags: [attention-surgery, hybrid-attention]
---

# Hybrid attention for {base or "a Wan transformer"}

{len(config.rates)} of {len(model.blocks)} self-attention layers are hybrid: softmax attention on every R-th token and
learned linear attention on the rest (normalizer "{config.normalizer}", pattern "{config.pattern}", φ of degree
{config.degree} and {config.layers} layers).{costs} This checkpoint holds {holds}.

```python
import attention_surgery as asg
from diffusers import {pipeline}

transformer = asg.from_pretrained("{repo_id}")
pipe = {pipeline}.from_pretrained("{base or "BASE"}", transformer=transformer)
```

| block | attention | error after distillation |
|---|---|---|
{chr(10).join(rows)}
{made}"""


def _without_folders(value: Any) -> Any:
    """A JSON value whose absolute paths are cut to their last part."""
    if isinstance(value, Mapping):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
