"""What cost and planning need to know of a Wan transformer, from its config alone: no weights are read."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..errors import ConfigError, ModelError
from ..files import read_json
from .hybrid_config import HybridConfig

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

    from ..ops.tokens import Grid

TEXT_TOKENS = 512
"""The text encoder's context length, which diffusers' Wan attention has built in as well."""
CLIP_TOKENS = 257
"""Image tokens of Wan2.1 I2V: a class token and 16×16 patches."""
WAN22_VAE_CHANNELS = 48
"""Latent channels of the Wan2.2 VAE, which compresses 4×16×16; the others compress 4×8×8."""


@dataclass(frozen=True, kw_only=True)
class WanSpec:
    """Dimensions of a Wan transformer and of the VAE in front of it. The defaults are shared by all Wan models.

    Args:
        blocks: number of transformer blocks.
        heads, head_dim: of every attention layer; the width of the model is their product.
        ffn_dim: hidden width of the feed-forward layers.
        patch_size: latent frames, rows and columns per token.
        vae_scale: frames, rows and columns of pixels per latent.
        text_tokens: length of the text context.
        image_tokens: length of the image context (I2V), 0 for none.
        added_kv_dim: input width of the image context's projections, None for none.
        qk_norm, cross_attn_norm, eps: as in the diffusers config.
        hybrid: how the model is converted, None for a stock one.
    """

    blocks: int
    heads: int
    head_dim: int
    ffn_dim: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    vae_scale: tuple[int, int, int] = (4, 8, 8)
    text_tokens: int = TEXT_TOKENS
    image_tokens: int = 0
    added_kv_dim: int | None = None
    qk_norm: str = "rms_norm_across_heads"
    cross_attn_norm: bool = True
    eps: float = 1e-6
    hybrid: HybridConfig | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        positive = {name: getattr(self, name) for name in ("blocks", "heads", "head_dim", "ffn_dim", "text_tokens")}
        for name in ("patch_size", "vae_scale"):
            sizes = tuple(getattr(self, name))
            if len(sizes) != 3:
                raise ModelError(f"{name} is {sizes}; expected three numbers: frames, rows, columns")
            object.__setattr__(self, name, sizes)
            positive |= {f"{name}[{i}]": size for i, size in enumerate(sizes)}
        for name, value in positive.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{name} is {value!r}; expected an integer >= 1")

    @property
    def dim(self) -> int:
        """Width of the model."""
        return self.heads * self.head_dim

    def grid(self, num_frames: int, height: int, width: int) -> "Grid":
        """Frames, rows and columns of the token grid of a video of `num_frames` × `height` × `width` pixels.

        Raises:
            ConfigError: a size that the VAE and the patches do not divide; the message names the nearest that fit.
        """
        sizes = {"num_frames": num_frames, "height": height, "width": width}
        grid = []
        for (name, size), scale, patch in zip(sizes.items(), self.vae_scale, self.patch_size, strict=True):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigError(f"{name} is {size!r}; expected an integer >= 1")
            unit, lead = scale * patch, scale - 1 if name == "num_frames" else 0  # the first latent is a single frame
            count, rest = divmod(size + lead, unit)
            if rest:
                fitting = [str(n * unit - lead) for n in (count, count + 1) if n > 0]
                raise ConfigError(f"{name} is {size}; this model takes {' or '.join(fitting)}")
            grid.append(count)
        return (grid[0], grid[1], grid[2])

    def tokens(self, num_frames: int, height: int, width: int) -> int:
        """N, the number of tokens of one video."""
        return math.prod(self.grid(num_frames, height, width))


def read_wan(source: "WanSpec | WanTransformer3DModel | Mapping[str, Any] | str | Path") -> WanSpec:
    """The dimensions of `source`, read from its config; weights are neither loaded nor downloaded.

    Args:
        source: a `WanTransformer3DModel`; its config as a mapping; the folder of a pipeline or of a transformer; a hub
            id, such as "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"; or a WanSpec, which is returned as it is.
            The pipeline's `vae/config.json` says how far the VAE compresses, also for its transformer folder and for a
            model or config loaded from there. Where there is none it is 4×16×16 for 48 latent channels
            (Wan2.2-TI2V-5B) and 4×8×8 otherwise. A φ-only checkpoint has the dimensions of its base model.

    Raises:
        ModelError: no Wan transformer, no such folder or repository, or a config that lacks an entry.
    """
    if isinstance(source, WanSpec):
        return source
    if isinstance(source, Mapping):
        return _from_config(source, None, "this mapping")
    if not isinstance(source, str | Path):
        return _from_model(source)
    if Path(source).is_dir():
        read = _folder_reader(_pipeline_folder(Path(source).resolve()))
    elif isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        read = _hub_reader(source)
    else:
        raise ModelError(f"{source} is neither a folder nor a hub id (owner/name)")
    config = read("transformer/config.json") or read("config.json")
    if config is None:
        raise ModelError(f"{source} has neither transformer/config.json nor config.json; expected a diffusers model")
    if "phi_format" in config:
        base = config["base"]["name"]
        if not base:
            raise ModelError(f"{source} holds φ only, of a base model made in memory; give a model or its config")
        return replace(read_wan(base), hybrid=HybridConfig.from_dict(config["hybrid"]))
    return _from_config(config, read("vae/config.json"), str(source))


def pipeline_grid(pipe: Any, *, num_frames: int, height: int, width: int) -> "Grid":
    """Frames, rows and columns of the tokens of a video of this size in the pipeline `pipe`, of its own VAE.

    Raises:
        ConfigError: a size that the VAE and the patches do not divide, which the pipeline would round.
    """
    pixels = pipe.vae_scale_factor_spatial
    spec = replace(read_wan(pipe.transformer), vae_scale=(pipe.vae_scale_factor_temporal, pixels, pixels))
    return spec.grid(num_frames, height, width)


Reader = Callable[[str], dict[str, Any] | None]
"""Reads one JSON file of a model, by its path within it; None if there is no such file."""


def _pipeline_folder(folder: Path) -> Path:
    """The folder above, if `folder` is a pipeline's transformer/; `folder` itself otherwise."""
    return folder.parent if folder.name == "transformer" else folder


def _folder_reader(folder: Path) -> Reader:
    def read(name: str) -> dict[str, Any] | None:
        path = folder / name
        if not path.exists():
            return None
        try:
            return read_json(path)
        except ValueError as error:
            raise ModelError(f"{path} is not JSON: {error}") from error

    return read


def _hub_reader(repo: str) -> Reader:
    def read(name: str) -> dict[str, Any] | None:
        try:
            return read_json(hf_hub_download(repo, name))
        except LocalEntryNotFoundError as error:
            raise ModelError(
                f"{repo}/{name} is not in the local cache and the hub cannot be reached; give a folder, or go online"
            ) from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError) as error:
            raise ModelError(f"{repo} cannot be read from the hub: {error}") from error

    return read


def _from_model(model: Any) -> WanSpec:
    from diffusers import WanTransformer3DModel  # seconds to import, which a folder's config does not need

    if not isinstance(model, WanTransformer3DModel):
        raise ModelError(
            f"cannot read a {type(model).__name__}; expected a WanTransformer3DModel, its config, a folder or a hub id"
        )
    return _from_config(dict(model.config), None, type(model).__name__)


def _from_config(config: Mapping[str, Any], vae: Mapping[str, Any] | None, where: str) -> WanSpec:
    name = config.get("_class_name", "WanTransformer3DModel")
    if name not in ("WanTransformer3DModel", "HybridWanTransformer3DModel"):
        raise ModelError(f"{where} is a {name}; expected a WanTransformer3DModel")
    needed = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "in_channels", "patch_size")
    missing = [entry for entry in needed if entry not in config]
    if missing:
        raise ModelError(f"{where} lacks {', '.join(missing)}; expected the config of a WanTransformer3DModel")
    if vae is None and (origin := config.get("_name_or_path")):
        vae = _folder_reader(_pipeline_folder(Path(origin)))("vae/config.json")
    if vae is not None:  # absent entries have AutoencoderKLWan's defaults
        frames, pixels = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    else:
        frames, pixels = 4, 16 if config["in_channels"] == WAN22_VAE_CHANNELS else 8
    added_kv_dim = config.get("added_kv_proj_dim")
    options = {name: config[name] for name in ("qk_norm", "cross_attn_norm", "eps") if name in config}
    return WanSpec(
        blocks=config["num_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        ffn_dim=config["ffn_dim"],
        patch_size=tuple(config["patch_size"]),
        vae_scale=(frames, pixels, pixels),
        image_tokens=0 if added_kv_dim is None else config.get("pos_embed_seq_len") or CLIP_TOKENS,
        added_kv_dim=added_kv_dim,
        hybrid=HybridConfig.from_dict(config["hybrid"]) if "hybrid" in config else None,
        **options,
    )
