"""The whole training of tiny-wan: clips, autoencoder, latents, diffusion, pipeline. Goes on where it stopped."""

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.configuration_utils import FrozenDict
from torch import nn

from .. import shapes
from ..errors import RunError
from ..files import append_jsonl, digest, read_json, write_json
from .autoencoder import encode_clips, psnr, train_autoencoder
from .build import build_pipeline, build_text_encoder, build_tokenizer, build_transformer, build_vae
from .clips import render_clips
from .config import TeacherConfig
from .diffusion import Diffusion, train_diffusion
from .evaluate import captions_for, contact_sheet, sample

HELDOUT_SEED = 900_000
SHOWN = 4


def train_teacher(
    config: TeacherConfig,
    folder: Path,
    *,
    device: str = "auto",
    scratch: Path | None = None,
    slice_minutes: float = float("inf"),
    start_from: Path | None = None,
) -> bool:
    """Train in `folder`; the finished pipeline is at `folder/tiny-wan`, in bfloat16.

    Args:
        config: sizes and times.
        folder: `config.json`, `log.jsonl`, `autoencoder.pt`, `vae/`, `training.pt`, `samples/`, `tiny-wan/` of the run.
        device: "auto" takes a GPU if there is one.
        scratch: where the rendered clips go (about 0.2 MB each); default `folder/clips`.
        slice_minutes: stop the autoencoder's and the diffusion training after this long; call again to go on.
        start_from: a finished pipeline of the same sizes whose weights all trainings start from, for a machine that the
            checkpoints of an earlier run could not be brought to.

    Returns:
        Whether the training is complete.

    Raises:
        RunError: the folder was made with another config.
    """
    at = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    if (folder / "config.json").exists() and read_json(folder / "config.json") != settings:
        raise RunError(f"{folder} was made with another config; use that one, or another folder")
    write_json(folder / "config.json", settings)

    def log(**row: Any) -> None:
        append_jsonl(folder / "log.jsonl", row)
        print(json.dumps(row), flush=True)

    machine = (
        torch.cuda.get_device_name(at)
        if at.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    versions = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    log(stage="start", device=machine, **versions)
    frames, captions = render_clips(scratch or folder / "clips", config.clips, seed=config.seed)
    log(stage="clips", clips=len(captions), captions_digest=digest(captions))

    torch.manual_seed(config.seed)
    vae_folder = folder / "vae"
    if (vae_folder / "config.json").exists():
        vae = AutoencoderKLWan.from_pretrained(vae_folder).eval().requires_grad_(False)
        cast(nn.Module, vae).to(at)  # diffusers wraps `to` so that type checkers see no method
    else:
        vae = (
            build_vae(config)
            if start_from is None
            else AutoencoderKLWan.from_pretrained(start_from / "vae", dtype=torch.float32)
        )
        if not train_autoencoder(
            vae,
            frames,
            config,
            at,
            folder / "autoencoder.pt",
            lambda row: log(stage="autoencoder", **row),
            slice_minutes=slice_minutes,
        ):
            log(stage="saved", complete=False)
            return False
        heldout = [clip.frames for clip in shapes.render(64, seed=HELDOUT_SEED, split="heldout")]
        log(stage="autoencoder", heldout_psnr=psnr(vae, torch.stack([torch.from_numpy(f) for f in heldout]), at))
        _, mean, deviation = encode_clips(vae, frames[:4096], at)
        vae._internal_dict = FrozenDict(
            dict(vae.config) | {"latents_mean": mean.tolist(), "latents_std": deviation.tolist()}
        )
        vae.save_pretrained(vae_folder)
    latents, _, _ = encode_clips(vae, frames, at)
    log(stage="latents", shape=list(latents.shape))

    tokenizer = build_tokenizer()
    torch.manual_seed(config.seed + 1)
    model = Diffusion(build_text_encoder(config, len(tokenizer)), build_transformer(config))
    if start_from is not None:
        earlier = WanPipeline.from_pretrained(start_from, dtype=torch.float32)
        model.transformer.load_state_dict(earlier.transformer.state_dict())
        words = earlier.tokenizer.get_vocab()
        rows = torch.tensor([words[word] for word in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))])
        embeddings = ("shared.weight", "encoder.embed_tokens.weight")
        state = earlier.text_encoder.state_dict()
        model.text_encoder.load_state_dict(state | {name: state[name][rows] for name in embeddings})
    log(stage="diffusion", parameters=sum(parameter.numel() for parameter in model.parameters()))

    def show(average: Diffusion, step: int) -> None:
        """A contact sheet of what the model draws so far, with the seeds of the evaluation."""
        pipe = build_pipeline(config, vae, average.transformer, average.text_encoder)  # type: ignore[arg-type]
        shown = captions_for("train", SHOWN)
        clips = sample(pipe, shown, guidance=config.guidance, steps=config.steps, batch=SHOWN)
        contact_sheet(folder / "samples" / f"step-{step:06d}.png", clips, shown)

    average, complete = train_diffusion(
        model,
        tokenizer,
        latents,
        captions,
        config,
        at,
        folder / "training.pt",
        lambda row: log(stage="diffusion", **row),
        show,
        slice_minutes=slice_minutes,
    )
    pipe = build_pipeline(config, vae.to(torch.bfloat16), average.transformer, average.text_encoder)  # type: ignore[arg-type]
    pipe.to(torch.bfloat16).save_pretrained(folder / "tiny-wan", max_shard_size="15MB")
    log(stage="saved", complete=complete)
    return complete
