"""`push_to_hub`: a hybrid checkpoint as a repository of the Hugging Face hub."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import WanTransformer3DModel
from huggingface_hub import HfApi

from ..files import read_json, write_json, write_text
from .card import CLASS_NAME, REMOTE_CODE, REMOTE_MODULE
from .store import Weights, save_pretrained


def push_to_hub(
    model: WanTransformer3DModel,
    repo_id: str,
    *,
    weights: Weights = "all",
    private: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """Upload what `save_pretrained` writes, model card and loading code included, in one commit; return its address.

    Raises:
        ModelError: `model` is not converted. Hub errors are huggingface_hub's own.
    """
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "checkpoint"
        save_pretrained(model, staged, weights=weights, provenance=provenance)
        if weights == "all":
            config = read_json(staged / "config.json")
            write_json(staged / "config.json", config | {"auto_map": {"AutoModel": f"{REMOTE_MODULE}.{CLASS_NAME}"}})
            write_text(staged / f"{REMOTE_MODULE}.py", REMOTE_CODE)
        api = HfApi()
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=staged, commit_message="Upload hybrid attention checkpoint")
    return str(repo)
