"""What is read from a Wan config, wherever it comes from, and the token grid of a video."""

import hashlib
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel, WanVACETransformer3DModel
from micro_wan import micro_pipeline, micro_transformer

from attention_surgery import HybridConfig, convert_
from attention_surgery.checkpoint import save_pretrained
from attention_surgery.errors import ConfigError, ModelError
from attention_surgery.models import wan
from attention_surgery.models.wan import WanSpec, read_wan

T2V_1_3B = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
I2V_14B = T2V_1_3B | {
    "num_layers": 40,
    "num_attention_heads": 40,
    "ffn_dim": 13824,
    "in_channels": 36,
    "added_kv_proj_dim": 5120,
    "image_dim": 1280,
}
TI2V_5B = T2V_1_3B | {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
SPEC_1_3B = WanSpec(blocks=30, heads=12, head_dim=128, ffn_dim=8960)


def test_configs_of_the_released_models():
    assert read_wan(T2V_1_3B) == SPEC_1_3B
    assert SPEC_1_3B.dim == 1536
    assert SPEC_1_3B.text_tokens == 512
    image = read_wan(I2V_14B)
    assert (image.image_tokens, image.added_kv_dim, image.blocks, image.dim) == (257, 5120, 40, 5120)
    assert read_wan(I2V_14B | {"pos_embed_seq_len": 514}).image_tokens == 514
    assert read_wan(TI2V_5B).vae_scale == (4, 16, 16)


@pytest.mark.parametrize(
    ("config", "size", "grid"),
    [
        (T2V_1_3B, (81, 480, 832), (21, 30, 52)),
        (T2V_1_3B, (81, 320, 480), (21, 20, 30)),
        (T2V_1_3B, (1, 16, 16), (1, 1, 1)),
        (I2V_14B, (81, 720, 1280), (21, 45, 80)),
        (TI2V_5B, (121, 704, 1280), (31, 22, 40)),
    ],
)
def test_grid(config, size, grid):
    spec = read_wan(config)
    assert spec.grid(*size) == grid
    assert spec.tokens(*size) == grid[0] * grid[1] * grid[2]


def test_the_grid_is_that_of_the_models_own_patches():
    pipe = micro_pipeline()
    latents = pipe.prepare_latents(1, 4, 24, 40, 9, torch.float32, torch.device("cpu"), torch.Generator())
    tokens = pipe.transformer.patch_embedding(latents)
    assert WanSpec(blocks=3, heads=2, head_dim=12, ffn_dim=48, vae_scale=(2, 4, 4)).grid(9, 24, 40) == tokens.shape[2:]


def test_temporal_patches():
    spec = WanSpec(blocks=1, heads=1, head_dim=12, ffn_dim=8, patch_size=(2, 2, 2))
    assert spec.grid(5, 16, 16) == (1, 1, 1)
    with pytest.raises(ConfigError, match="num_frames is 9; this model takes 5 or 13"):
        spec.grid(9, 16, 16)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((80, 480, 832), "num_frames is 80; this model takes 77 or 81"),
        ((2, 480, 832), "num_frames is 2; this model takes 1 or 5"),
        ((81, 1080, 1920), "height is 1080; this model takes 1072 or 1088"),
        ((81, 480, 8), "width is 8; this model takes 16"),
        ((0, 480, 832), "num_frames is 0; expected an integer >= 1"),
        ((81, 480.0, 832), r"height is 480\.0; expected an integer >= 1"),
    ],
)
def test_videos_that_do_not_fit(size, message):
    with pytest.raises(ConfigError, match=message):
        SPEC_1_3B.grid(*size)


def test_a_model_and_a_converted_one():
    model = micro_transformer()
    expected = WanSpec(blocks=3, heads=2, head_dim=12, ffn_dim=48)
    assert read_wan(model) == read_wan(dict(model.config)) == expected
    convert_(model, HybridConfig({1: 4, 2: "linear"}))
    assert read_wan(model).hybrid == HybridConfig({1: 4, 2: "linear"})
    assert read_wan(expected) is expected


def test_folders(tmp_path):
    micro_pipeline().save_pretrained(tmp_path / "pipe")
    expected = WanSpec(blocks=3, heads=2, head_dim=12, ffn_dim=48, vae_scale=(2, 4, 4))
    assert read_wan(tmp_path / "pipe") == expected
    assert read_wan(str(tmp_path / "pipe")) == expected
    assert read_wan(tmp_path / "pipe" / "transformer") == expected
    model = WanTransformer3DModel.from_pretrained(tmp_path / "pipe", subfolder="transformer")
    assert read_wan(model) == expected
    assert read_wan(WanPipeline.from_pretrained(tmp_path / "pipe").transformer) == expected
    model = WanTransformer3DModel.from_pretrained(tmp_path / "pipe" / "transformer")
    assert read_wan(model) == expected

    micro_transformer().save_pretrained(tmp_path / "alone")
    assert read_wan(tmp_path / "alone").vae_scale == (4, 8, 8)

    convert_(model, HybridConfig({0: 2}))
    save_pretrained(model, tmp_path / "phi", weights="phi")
    assert read_wan(tmp_path / "phi").hybrid == HybridConfig({0: 2})
    assert read_wan(tmp_path / "phi").vae_scale == (2, 4, 4)
    save_pretrained(model, tmp_path / "all")
    assert read_wan(tmp_path / "all").hybrid == HybridConfig({0: 2})
    convert_(stranger := micro_transformer(), HybridConfig({0: 2}))
    save_pretrained(stranger, tmp_path / "stranger", weights="phi")
    with pytest.raises(ModelError, match="holds φ only, of a base model made in memory"):
        read_wan(tmp_path / "stranger")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, asked through the real client: repository → file → JSON; requests are on record."""
    files, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self, body=False):
            owner, name, _, _, path = self.path.lstrip("/").split("/", 4)
            repo = files.get(f"{owner}/{name}")
            content = json.dumps(repo[path]).encode() if repo and path in repo else b""
            self.send_response(200 if content else 404)
            if content:
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
            else:
                self.send_header("X-Error-Code", "RepoNotFound" if repo is None else "EntryNotFound")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                asked.append(path)
                self.wfile.write(content)

        def do_GET(self):
            self.do_HEAD(body=True)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    endpoint = f"http://127.0.0.1:{server.server_port}"
    client = partial(huggingface_hub.hf_hub_download, endpoint=endpoint, cache_dir=tmp_path / "cache", token=False)
    monkeypatch.setattr(wan, "hf_hub_download", client)
    yield files, asked
    server.shutdown()
    server.server_close()


def test_a_hub_pipeline_is_read_from_its_configs_alone(hub):
    files, asked = hub
    files["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"] = {
        "transformer/config.json": T2V_1_3B,
        "vae/config.json": {"z_dim": 16},
        "model_index.json": {},
    }
    assert read_wan("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == SPEC_1_3B
    assert sorted(asked) == ["transformer/config.json", "vae/config.json"]


def test_a_hub_transformer(hub):
    files, _ = hub
    files["someone/alone"] = {"config.json": TI2V_5B}
    files["someone/empty"] = {}
    assert read_wan("someone/alone").vae_scale == (4, 16, 16)
    with pytest.raises(ModelError, match=r"someone/empty has neither transformer/config\.json nor config\.json"):
        read_wan("someone/empty")
    with pytest.raises(ModelError, match="someone/missing cannot be read from the hub"):
        read_wan("someone/missing")


def test_without_a_network(tmp_path, monkeypatch):
    client = partial(huggingface_hub.hf_hub_download, cache_dir=tmp_path, local_files_only=True)
    monkeypatch.setattr(wan, "hf_hub_download", client)
    with pytest.raises(ModelError, match="is not in the local cache and the hub cannot be reached; give a folder"):
        read_wan("someone/model")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"num_layers": 3}, "this mapping lacks num_attention_heads, attention_head_dim, ffn_dim"),
        (T2V_1_3B | {"_class_name": "FluxTransformer2DModel"}, "is a FluxTransformer2DModel; expected a Wan"),
        (T2V_1_3B | {"num_layers": 0}, "blocks is 0; expected an integer >= 1"),
        (T2V_1_3B | {"patch_size": [2, 2]}, r"patch_size is \(2, 2\); expected three numbers"),
        ("no-such-folder", "no-such-folder is neither a folder nor a hub id"),
        ("a/b/c", "a/b/c is neither a folder nor a hub id"),
        ("some--one/model", "some--one/model cannot be read from the hub"),
        (7, "cannot read a int; expected a WanTransformer3DModel"),
    ],
)
def test_what_is_no_wan(source, message):
    with pytest.raises(ModelError, match=message):
        read_wan(source)


def test_other_wan_models_are_refused(tmp_path):
    vace = WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=16,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        vace_layers=[0],
    )
    with pytest.raises(ModelError, match="cannot read a WanVACETransformer3DModel"):
        read_wan(vace)
    with pytest.raises(ModelError, match="is a WanVACETransformer3DModel; expected a WanTransformer3DModel"):
        read_wan(dict(vace.config) | {"_class_name": "WanVACETransformer3DModel"})


def test_damaged_folders(tmp_path):
    with pytest.raises(ModelError, match=r"has neither transformer/config\.json nor config\.json"):
        read_wan(tmp_path)
    (tmp_path / "config.json").write_text('{"num_layers": 3')
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        read_wan(tmp_path)
