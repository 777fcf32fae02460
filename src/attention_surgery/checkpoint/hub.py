"""`push_to_hub`: a hybrid checkpoint as a repository of the Hugging Face hub."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from diffusers import WanTransformer3DModel
from huggingface_hub import HfApi

from ..files import read_json, write_json, write_text
from ..models import HybridWanTransformer3DModel
from .card import CLASS_NAME, REMOTE_CODE, REMOTE_MODULE, model_card
from .store import Weights, save_pretrained


def push_to_hub(
    model: WanTransformer3DModel,
    repo_id: str,
    *,
    weights: Weights = "all",
    private: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """Upload what `save_pretrained` writes in one commit, and return the repository's address.

    With all weights, the repository also loads by diffusers' `AutoModel.from_pretrained(repo, trust_remote_code=True)`.

    Args:
        model, weights, provenance: as in `save_pretrained`.
        repo_id: "owner/name"; made if it does not exist.
        private: whether a new repository is private; one that exists stays as it is.

    Raises:
        Those of `save_pretrained`, before anything is sent; huggingface_hub's own for the upload.
    """
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "checkpoint"
        save_pretrained(model, staged, weights=weights, provenance=provenance)
        hybrid = cast(HybridWanTransformer3DModel, model)
        card = model_card(hybrid, weights=weights, provenance=provenance or {}, repo_id=repo_id)
        write_text(staged / "README.md", card)
        if weights == "all":
            config = read_json(staged / "config.json")
            write_json(staged / "config.json", config | {"auto_map": {"AutoModel": f"{REMOTE_MODULE}.{CLASS_NAME}"}})
            write_text(staged / f"{REMOTE_MODULE}.py", REMOTE_CODE)
        api = HfApi()
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=staged, commit_message="Upload hybrid attention checkpoint")
    return str(repo)
