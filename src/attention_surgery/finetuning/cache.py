"""Latents and text embeddings on disk, computed once by the pipeline's own encoders."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import DataError
from ..files import append_jsonl, digest, write_tensors
from ..processes import join_processes
from ..progress import progress
from .config import FinetuneConfig
from .dataset import Entry, load_clip

logger = logging.getLogger("attention_surgery")


class LatentCache:
    """One safetensors file per video, named by the digest of its bytes, its caption and the settings that matter.

    A changed video, caption or setting therefore has another name, and nothing stale is ever read. The processes share
    the work; a run that is killed goes on where it was. What fitting a video to the settings drops or repeats is said
    once for all, and for each in `fitting-PROCESS.jsonl`.

    Args:
        folder: of the files.
        pipe: encodes what is missing.
        entries: videos and captions.
        config: shape, frame rate and text length.

    Raises:
        DataError: videos that cannot be used, all of them named at once, unless `config.skip_bad`.
    """

    def __init__(self, folder: Path, pipe: Any, entries: Sequence[Entry], config: FinetuneConfig) -> None:
        self.folder, self.pipe, self.config = folder, pipe, config
        self.length = config.max_sequence_length
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state = join_processes(cpu=pipe._execution_device.type == "cpu")
        settings = {
            name: getattr(config, name) for name in ("num_frames", "height", "width", "fps", "max_sequence_length")
        }
        settings["encoders"] = _encoder_digest(pipe)
        self.files = [folder / f"{_name(entry, settings)}.safetensors" for entry in entries]
        self.empty_file = folder / f"{digest(['', settings])}.safetensors"
        mine = [
            (entry, file)
            for entry, file in list(zip(entries, self.files, strict=True))[state.process_index :: state.num_processes]
            if not file.exists()
        ]
        faults: list[str] = []
        fitted: list[dict[str, Any]] = []
        with progress("encode videos", len(mine)) as advance:
            for entry, file in mine:
                try:
                    fitted.append(self._encode(entry, file))
                except DataError as error:
                    faults.append(str(error))
                advance("")
        if state.is_main_process and not self.empty_file.exists():
            write_tensors(self.empty_file, {"text": self._embed("")})
        state.wait_for_everyone()
        if told := _told(fitted, config):
            logger.warning("of %d videos that were encoded now, %s", len(fitted), told)
        absent = [entry.path.name for entry, file in zip(entries, self.files, strict=True) if not file.exists()]
        if absent and not config.skip_bad:
            raise DataError(f"{len(absent)} of {len(entries)} videos cannot be used: {'; '.join(faults) or absent}")
        if absent:
            logger.warning("skipped %d of %d videos that cannot be used: %s", len(absent), len(entries), absent)
        kept = [(entry, file) for entry, file in zip(entries, self.files, strict=True) if file.exists()]
        self.entries, self.files = [entry for entry, _ in kept], [file for _, file in kept]
        self.empty = self._pad(load_file(self.empty_file)["text"])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Latents (c f h w), normalised as the transformer takes them, and text embedding (l d), zero-padded."""
        try:
            tensors = load_file(self.files[index])
        except SafetensorError as error:
            raise DataError(f"{self.files[index]} is damaged ({error}); delete it, and it is made again") from error
        return tensors["latents"], self._pad(tensors["text"])

    @torch.no_grad()
    def _encode(self, entry: Entry, file: Path) -> dict[str, Any]:
        config = self.config
        clip = load_clip(
            entry.path, num_frames=config.num_frames, height=config.height, width=config.width, fps=config.fps
        )
        vae, device = self.pipe.vae, self.pipe._execution_device
        video = torch.from_numpy(clip.frames).permute(3, 0, 1, 2)[None].to(device, vae.dtype) / 127.5 - 1
        latents = vae.encode(video).latent_dist.mode().float()
        shape = (1, -1, 1, 1, 1)
        mean = torch.tensor(vae.config.latents_mean, device=device).view(shape)
        deviation = torch.tensor(vae.config.latents_std, device=device).view(shape)
        tensors = {"latents": ((latents - mean) / deviation)[0].cpu(), "text": self._embed(entry.caption)}
        write_tensors(file, tensors)
        row = {
            "video": entry.path.name,
            "dropped_seconds": round(clip.dropped_seconds, 3),
            "skipped_frames": clip.skipped_frames,
            "repeated_frames": clip.repeated_frames,
            "cropped": round(clip.cropped, 4),
        }
        append_jsonl(self.folder / f"fitting-{self.state.process_index}.jsonl", row)
        return row

    @torch.no_grad()
    def _embed(self, caption: str) -> Tensor:
        """Embedding of a caption without the zeros that the pipeline appends."""
        embedding, _ = self.pipe.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=self.length
        )
        used = embedding[0].any(dim=-1).nonzero()
        return embedding[0, : int(used[-1]) + 1 if len(used) else 0].float().cpu()

    def _pad(self, text: Tensor) -> Tensor:
        return torch.nn.functional.pad(text, (0, 0, 0, self.length - len(text)))


def _name(entry: Entry, settings: dict[str, Any]) -> str:
    with open(entry.path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return digest([content, entry.caption, settings])


def _told(rows: Sequence[dict[str, Any]], config: FinetuneConfig) -> str:
    """What fitting these videos to the settings dropped or repeated, in words; empty if nothing."""
    seconds, skipped, repeated = (
        sum(row[name] for row in rows) for name in ("dropped_seconds", "skipped_frames", "repeated_frames")
    )
    cropped = [row["cropped"] for row in rows if row["cropped"] > 0.005]
    parts = [
        f"{seconds:.1f} seconds after the {config.num_frames} frames that are trained on are not used"
        if seconds > 0.05
        else "",
        f"{skipped} frames are skipped to come down to {config.fps} per second" if skipped else "",
        f"{repeated} are repeated to come up to {config.fps} per second" if repeated else "",
        f"{len(cropped)} are cropped, by up to {max(cropped):.0%} of the picture" if cropped else "",
    ]
    return "; ".join(part for part in parts if part)


def _encoder_digest(pipe: Any) -> str:
    """Tells two pipelines' encoders apart by their configs and a few weights."""
    configs = [dict(pipe.vae.config).get("z_dim"), pipe.vae.config.latents_mean, pipe.text_encoder.config.d_model]
    weights = [float(next(module.parameters()).detach().float().sum()) for module in (pipe.vae, pipe.text_encoder)]
    return digest([configs, [f"{weight:.4e}" for weight in weights]])
