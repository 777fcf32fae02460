"""At the size of Wan2.1-T2V-1.3B, with random weights: convert, keep, load, and one denoising step."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

import attention_surgery as asg

WAN_1_3B = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
RATES: dict[int, asg.Rate] = dict.fromkeys(range(5, 25), 4) | {10: 8, 20: "linear"}
GIBIBYTE = 2**30


def resident(what: str) -> float:
    """VmRSS (now) or VmHWM (at most), in GiB."""
    match = re.search(what + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) / 2**20


def size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*")) / GIBIBYTE


def denoise(transformer) -> torch.Tensor:
    """One step of the stock pipeline, with guidance, of 5 frames of 128×128."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer)
    generator = torch.Generator().manual_seed(0)
    prompt, negative = torch.randn(2, 1, 512, 4096, generator=generator).to(torch.bfloat16)
    return pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        height=128,
        width=128,
        num_frames=5,
        num_inference_steps=1,
        generator=generator,
        output_type="latent",
    ).frames


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_wan_1_3b(tmp_path):
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = WanTransformer3DModel(**WAN_1_3B).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    assert 1.41e9 < sum(p.numel() for p in model.parameters()) < 1.43e9
    model.save_pretrained(tmp_path / "base")
    del model

    model = WanTransformer3DModel.from_pretrained(tmp_path / "base", torch_dtype=torch.bfloat16)
    asg.convert_(model, asg.HybridConfig(RATES))
    added = sum(p.numel() for name, p in model.named_parameters() if ".processor." in name)
    assert added / 20 == pytest.approx(2.4e6, rel=0.02)  # per converted block
    asg.save_pretrained(model, tmp_path / "phi", weights="phi")
    asg.save_pretrained(model, tmp_path / "all", max_shard_size="1GB")
    assert size(tmp_path / "phi") < 0.1 < 2.6 < size(tmp_path / "all")
    latents = denoise(model)
    assert latents.shape == (1, 16, 2, 16, 16) and latents.isfinite().all()
    with asg.disabled(model):
        assert not torch.equal(denoise(model), latents)
    state = model.state_dict()

    from_phi = asg.from_pretrained(tmp_path / "phi", torch_dtype=torch.bfloat16)
    loaded = from_phi.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    del from_phi, loaded
    shutil.rmtree(tmp_path / "base")

    from_all = asg.from_pretrained(tmp_path / "all", torch_dtype=torch.bfloat16)
    loaded = from_all.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    torch.testing.assert_close(denoise(from_all), latents)
    shutil.rmtree(tmp_path / "all")

    peak = resident("VmHWM")
    print(f"peak {peak:.2f} GiB resident")
    assert peak < 20e9 / GIBIBYTE
