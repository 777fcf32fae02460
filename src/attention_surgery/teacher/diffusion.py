"""Training the transformer and the text encoder together, by flow matching on latents."""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from ..errors import DivergenceError
from ..files import write_torch
from .config import TeacherConfig

TEXT_LENGTH = 512
"""Text tokens of the transformer's cross-attention: what WanPipeline pads to by default, with zeros and no mask."""


class Diffusion(nn.Module):
    """What is trained: the text encoder and the transformer."""

    def __init__(self, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Caption tokens (b l) to what WanPipeline gives the transformer: zeros after each caption's end, 512 long."""
        embeddings = self.text_encoder(ids, mask).last_hidden_state * mask[..., None]
        return nn.functional.pad(embeddings, (0, 0, 0, TEXT_LENGTH - ids.shape[1]))

    def forward(self, noisy: Tensor, sigma: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Velocity of `noisy` (b c f h w) at noise level `sigma` (b)."""
        return self.transformer(noisy, 1000 * sigma, self.embed(ids, mask), return_dict=False)[0]


def train_diffusion(
    model: Diffusion,
    tokenizer: PreTrainedTokenizerFast,
    latents: Tensor,
    captions: list[str],
    config: TeacherConfig,
    device: torch.device,
    checkpoint: Path,
    report: Callable[[dict[str, float]], None],
    show: Callable[[Diffusion, int], None],
    *,
    slice_minutes: float = float("inf"),
) -> tuple[Diffusion, bool]:
    """Flow matching for `config.diffusion_minutes` in all: x_t = (1 - σ) x_0 + σ ε, target ε - x_0, shifted σ.

    Returns the averaged weights, and whether the time is used up. A run that stopped, after `slice_minutes` or by
    force, goes on from `checkpoint`. `show` is called with the averaged weights and the step every
    `config.sample_seconds`.

    Raises:
        DivergenceError: a loss or gradient that is not finite; the last checkpoint stands.
    """
    model.to(device).train().requires_grad_(True)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator(device).manual_seed(config.seed)
    step, before = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"].cpu())
        step, before = saved["step"], saved["seconds"]
    if config.compile:
        model.transformer.compile_repeated_blocks(fullgraph=True)
    ids, mask = tokenize(tokenizer, captions, device)
    empty_ids, empty_mask = tokenize(tokenizer, [""], device, length=ids.shape[1])
    weights: list[Tensor] = list(model.parameters())
    averages: list[Tensor] = list(average.parameters())

    def save(seconds: float) -> None:
        if not all(map(math.isfinite, (last_loss.item(), last_norm.item()))):
            raise DivergenceError(
                f"the loss is {last_loss.item()} and the gradient {last_norm.item()} before step {step}; "
                "the last checkpoint stands: lower lr"
            )
        state: dict[str, Any] = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "step": step,
            "seconds": seconds,
        }
        write_torch(checkpoint, state)

    last_loss = last_norm = torch.zeros(())
    start = saved_at = shown_at = time.monotonic()
    total = 60 * config.diffusion_minutes
    while (seconds := before + time.monotonic() - start) < total and seconds - before < 60 * slice_minutes:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / 200) * (1 - seconds / total)
        index = torch.randint(len(latents), (config.batch,), generator=generator, device=device)
        clean = latents[index].float()
        drop = torch.rand(config.batch, 1, generator=generator, device=device) < config.caption_dropout
        chosen_ids = torch.where(drop, empty_ids, ids[index])
        chosen_mask = torch.where(drop, empty_mask, mask[index])
        order = torch.randperm(config.batch, generator=generator, device=device)
        uniform = (order + torch.rand(config.batch, generator=generator, device=device)) / config.batch
        sigma = config.shift * uniform / (1 + (config.shift - 1) * uniform)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        level = sigma[:, None, None, None, None]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            velocity = model((1 - level) * clean + level * noise, sigma, chosen_ids, chosen_mask)
        loss = (velocity.float() - (noise - clean)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        last_loss, last_norm = loss.detach(), norm.detach()
        optimizer.step()
        step += 1
        decay = min(config.ema, step / (step + 10))
        torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1 - decay)
        if step % 100 == 0:
            report({"step": step, "loss": loss.item(), "gradient_norm": norm.item(), "seconds": seconds})
        if time.monotonic() - saved_at > config.checkpoint_seconds:
            save(before + time.monotonic() - start)
            saved_at = time.monotonic()
        if time.monotonic() - shown_at > config.sample_seconds:
            shown_at = time.monotonic()
            show(average, step)
            pause = time.monotonic() - shown_at
            start, saved_at, shown_at = start + pause, saved_at + pause, shown_at + pause
    save(before + time.monotonic() - start)
    return average, seconds >= total


def tokenize(
    tokenizer: PreTrainedTokenizerFast, captions: list[str], device: torch.device, *, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Ids and mask (n l) on `device`, padded to `length` or to the longest caption."""
    padding = "max_length" if length else "longest"
    tokens = tokenizer(captions, padding=padding, max_length=length, return_tensors="pt")
    return tokens.input_ids.to(device), tokens.attention_mask.to(device)
