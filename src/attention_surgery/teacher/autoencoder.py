"""Training the autoencoder, and turning the clips into latents once."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from ..files import write_torch
from .clips import to_unit
from .config import TeacherConfig

Report = Callable[[dict[str, float]], None]


def encode(vae: AutoencoderKLWan, clips: Tensor) -> DiagonalGaussianDistribution:
    """The distribution of the latents (b c f h w) of clips (b 3 f h w) in [-1, 1]."""
    return vae.encode(clips, return_dict=False)[0]


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Clips (b 3 f h w) of latents (b c f h w)."""
    return vae.decode(latents, return_dict=False)[0]


def train_autoencoder(
    vae: AutoencoderKLWan,
    frames: Tensor,
    config: TeacherConfig,
    device: torch.device,
    checkpoint: Path,
    report: Report,
    *,
    slice_minutes: float = math.inf,
) -> bool:
    """Fit `vae` to windows of the clips for `config.vae_minutes`, in place: L1, squared error and a little KL.

    Goes on from `checkpoint` if it is there, and writes it every `config.checkpoint_seconds` and when it stops, after
    `slice_minutes` at the latest. Returns whether the training is complete.
    """
    cast(nn.Module, vae).to(device)  # diffusers wraps `to` so that type checkers see no method
    vae.train().requires_grad_(True)
    on_gpu = device.type == "cuda"
    lr = torch.tensor(0.0, device=device)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, foreach=on_gpu, capturable=on_gpu
    )
    clip = torch.empty(config.vae_batch, config.vae_window, *frames.shape[2:], dtype=torch.uint8, device=device)

    def update() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        target = to_unit(clip)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            posterior = encode(vae, target)
            decoded = decode(vae, posterior.sample())
        error = decoded.float() - target
        mse = error.square().mean()
        loss = error.abs().mean() + 5 * mse + 1e-5 * posterior.kl().mean() / target[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0, foreach=True)
        optimizer.step()
        return loss.detach(), mse.detach()

    generator = torch.Generator().manual_seed(config.seed)
    step, before = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = lr  # this tensor, which is filled below
        generator.set_state(saved["generator"].cpu())
        step, before = saved["step"], saved["seconds"]

    def save(seconds: float) -> None:
        state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
        write_torch(checkpoint, state | {"step": step, "seconds": seconds})

    start = saved_at = time.monotonic()
    first_step, total = step, 60 * config.vae_minutes
    replay = update
    while (seconds := before + time.monotonic() - start) < total and seconds - before < 60 * slice_minutes:
        used = seconds / total
        lr.fill_(config.vae_lr * min(1.0, (step + 1) / 50) * (1 - used))
        index = torch.randint(len(frames), (config.vae_batch,), generator=generator)
        first = int(torch.randint(frames.shape[1] - config.vae_window + 1, (1,), generator=generator))
        clip.copy_(frames[index, first : first + config.vae_window])
        if on_gpu and step == first_step + 5:
            replay = _captured(update)
        loss, mse = replay()
        step += 1
        if step % 100 == 0:
            report({"step": step, "loss": loss.item(), "psnr": -10 * math.log10(mse.item() / 4), "used": used})
        if time.monotonic() - saved_at > config.checkpoint_seconds:
            save(before + time.monotonic() - start)
            saved_at = time.monotonic()
    save(before + time.monotonic() - start)
    vae.eval().requires_grad_(False)
    return seconds >= total


def _captured(update: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, Tensor]]:
    """`update` as a CUDA graph: the causal autoencoder is thousands of small kernels, whose launches take most time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            update()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = update()

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        return results

    return replay


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, frames: Tensor, device: torch.device, *, batch: int = 16) -> float:
    """Mean peak signal-to-noise ratio in dB of clips (n f h w 3) through the autoencoder, its latents not sampled."""
    ratios = []
    for part in frames.split(batch):
        clip = to_unit(part.to(device))
        decoded = decode(vae, encode(vae, clip).mode()).float().clamp(-1, 1)
        mse = (decoded - clip).square().flatten(1).mean(dim=1)
        ratios.append(-10 * torch.log10(mse / 4))
    return torch.cat(ratios).mean().item()


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLWan, frames: Tensor, device: torch.device, *, batch: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (n c f h w) in bfloat16 on `device`, normalised per channel, with their former mean and deviation."""
    parts = []
    for part in frames.split(batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            parts.append(encode(vae, to_unit(part.to(device))).mode().to(torch.bfloat16))
    latents = torch.cat(parts)
    sample = latents[:4096].float()
    mean, deviation = sample.mean(dim=(0, 2, 3, 4)), sample.std(dim=(0, 2, 3, 4))
    shape = (1, -1, 1, 1, 1)
    for part in latents.split(4096):
        part.copy_((part.float() - mean.view(shape)) / deviation.view(shape))
    return latents, mean, deviation
