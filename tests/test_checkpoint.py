"""Checkpoints: exact both ways, strict, whole or absent, and never run as softmax by accident."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, WanPipeline, WanTransformer3DModel
from micro_wan import micro_pipeline, micro_transformer
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import attention_surgery as asg
from attention_surgery.checkpoint import hub
from attention_surgery.errors import CheckpointError, ConfigError, ModelError

CONFIG = asg.HybridConfig({0: 2, 2: "linear"}, degree=3, normalizer="max", pattern="lattice")
INPUTS = (torch.randn(1, 4, 3, 8, 8), torch.tensor([500]), torch.randn(1, 7, 16))


def base_model(**changes) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return micro_transformer(**changes)


def hybrid_model(**changes) -> WanTransformer3DModel:
    model = base_model(**changes)
    asg.convert_(model, CONFIG)
    return model


def run(model, dtype=torch.float32):
    with torch.no_grad():
        return model(INPUTS[0].to(dtype), INPUTS[1], INPUTS[2].to(dtype), return_dict=False)[0]


def same_tensors(left, right) -> bool:
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model on disk, and a hybrid one made from it, kept whole and φ only."""
    root = tmp_path_factory.mktemp("saved")
    base_model().save_pretrained(root / "base")
    model = WanTransformer3DModel.from_pretrained(root / "base")
    asg.convert_(model, CONFIG)
    asg.save_pretrained(model, root / "all")
    asg.save_pretrained(model, root / "phi", weights="phi")
    return root, model


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "saved")
    return tmp_path / "saved"


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# --- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["all", "phi"])
def test_round_trip_is_exact(saved, weights):
    root, model = saved
    again = asg.from_pretrained(root / weights)
    assert type(again) is asg.HybridWanTransformer3DModel
    assert again.hybrid_config == model.hybrid_config == CONFIG
    assert same_tensors(again, model)
    torch.testing.assert_close(run(again), run(model))  # not bit-exact: a loaded file is aligned otherwise


def test_phi_only_checkpoint_holds_feature_maps_only(saved):
    root, model = saved
    tensors = load_file(root / "phi" / "phi.safetensors")
    assert tensors.keys() == {name for name in model.state_dict() if ".attn1.processor." in name}
    assert {name.split(".")[1] for name in tensors} == {"0", "2"}
    assert set(files(root / "phi")) == {"README.md", "config.json", "phi.safetensors"}


@pytest.mark.parametrize("weights", ["all", "phi"])
def test_dtype_is_diffusers_own_option(saved, weights):
    root, model = saved
    half = asg.from_pretrained(root / weights, torch_dtype=torch.bfloat16)
    assert half.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert half.blocks[0].attn1.processor.phi_q.weights[0].dtype == torch.bfloat16
    assert half.blocks[0].norm2.weight.dtype == torch.float32  # diffusers keeps Wan's norms so
    torch.testing.assert_close(run(half, torch.bfloat16).float(), run(model), rtol=0.1, atol=0.1)


def test_phi_fits_a_base_model_in_another_precision(saved, tmp_path):
    """Saved from a float32 base, loaded onto the same base in bfloat16, and saved from there."""
    root, _ = saved
    base = WanTransformer3DModel.from_pretrained(root / "base", torch_dtype=torch.bfloat16)
    assert asg.from_pretrained(root / "phi", base_model=base) is base
    asg.save_pretrained(base, tmp_path, weights="phi")
    again = asg.from_pretrained(tmp_path, base_model=root / "base")
    assert again.dtype == torch.float32


@pytest.mark.parametrize("kind", ["path", "string", "pipeline", "object"])
def test_a_base_model_can_be_given(saved, tmp_path, kind):
    root, model = saved
    shutil.copytree(root / "base", tmp_path / "pipeline" / "transformer")
    given = {
        "path": root / "base",
        "string": str(root / "base"),
        "pipeline": tmp_path / "pipeline",
        "object": base_model(),
    }[kind]
    assert same_tensors(asg.from_pretrained(root / "phi", base_model=given), model)


def test_a_base_model_made_in_memory_has_to_be_given(tmp_path):
    model = hybrid_model()
    asg.save_pretrained(model, tmp_path, weights="phi")
    with pytest.raises(CheckpointError, match="made in memory"):
        asg.from_pretrained(tmp_path)
    assert same_tensors(asg.from_pretrained(tmp_path, base_model=base_model()), model)


def test_shards(tmp_path):
    model = hybrid_model()
    asg.save_pretrained(model, tmp_path, max_shard_size=60_000)
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 2
    assert same_tensors(asg.from_pretrained(tmp_path), model)
    sorted(tmp_path.glob("*-of-*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        asg.from_pretrained(tmp_path)


def test_the_name_of_the_base_survives_whole_checkpoints(saved, tmp_path):
    root, _ = saved
    asg.save_pretrained(asg.from_pretrained(root / "all"), tmp_path / "again", weights="phi")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["base"]["name"] == str(root / "base")
    assert same_tensors(asg.from_pretrained(tmp_path / "again"), asg.from_pretrained(root / "all"))


def test_a_whole_pipeline_saves_and_loads(tmp_path):
    pipe = micro_pipeline()
    asg.convert_(pipe.transformer, CONFIG)
    pipe.register_modules(transformer=pipe.transformer)  # a pipeline notes the class of a component when it gets it
    pipe.save_pretrained(tmp_path)
    again = WanPipeline.from_pretrained(tmp_path)
    assert type(again.transformer) is asg.HybridWanTransformer3DModel
    assert same_tensors(again.transformer, pipe.transformer)


# --- never softmax by accident -------------------------------------------------------------------------------------


def test_the_stock_class_cannot_load_a_hybrid_checkpoint(saved):
    root, _ = saved
    for folder in ("all", "phi"):
        with pytest.raises(OSError, match="no file named"):
            WanTransformer3DModel.from_pretrained(root / folder)


def test_the_stock_pipeline_cannot_load_a_hybrid_checkpoint_as_its_transformer(tmp_path):
    pipe = micro_pipeline()
    asg.convert_(pipe.transformer, CONFIG)
    pipe.save_pretrained(tmp_path)  # its model_index.json still names the stock class
    with pytest.raises(OSError, match="no file named"):
        WanPipeline.from_pretrained(tmp_path)
    loaded = WanPipeline.from_pretrained(tmp_path, transformer=asg.from_pretrained(tmp_path / "transformer"))
    assert same_tensors(loaded.transformer, pipe.transformer)


# --- damaged, foreign, newer ---------------------------------------------------------------------------------------

FIRST = "blocks.0.attn1.processor.phi_q.weight_0"
DAMAGE = {
    "phi missing key": lambda c: edit_tensors(c / "phi/phi.safetensors", lambda t: t.pop(FIRST)),
    "phi unexpected key": lambda c: edit_tensors(
        c / "phi/phi.safetensors", lambda t: t.update({"blocks.1.attn1.processor.phi_q.weight_0": t[FIRST].clone()})
    ),
    "phi base key": lambda c: edit_tensors(
        c / "phi/phi.safetensors", lambda t: t.update({"proj_out.bias": torch.zeros(16)})
    ),
    "phi misshapen": lambda c: edit_tensors(
        c / "phi/phi.safetensors", lambda t: t.update({FIRST: t[FIRST][:, 1:].clone()})
    ),
    "phi truncated": lambda c: os.truncate(c / "phi/phi.safetensors", 1000),
    "phi empty": lambda c: os.truncate(c / "phi/phi.safetensors", 0),
    "phi absent": lambda c: (c / "phi/phi.safetensors").unlink(),
    "phi newer": lambda c: edit_json(c / "phi/config.json", lambda v: v.update(phi_format=2, more=1)),
    "phi newer hybrid": lambda c: edit_json(c / "phi/config.json", lambda v: v["hybrid"].update(format=2, gate=True)),
    "phi without base": lambda c: edit_json(c / "phi/config.json", lambda v: v.pop("base")),
    "phi other degree": lambda c: edit_json(c / "phi/config.json", lambda v: v["hybrid"].update(degree=2)),
    "phi other blocks": lambda c: edit_json(c / "phi/config.json", lambda v: v["hybrid"]["rates"].update({"1": 4})),
    "phi no such block": lambda c: edit_json(c / "phi/config.json", lambda v: v["hybrid"]["rates"].update({"9": 4})),
    "phi bad rate": lambda c: edit_json(c / "phi/config.json", lambda v: v["hybrid"]["rates"].update({"0": 0})),
    "phi bad rates": lambda c: edit_json(c / "phi/config.json", lambda v: v["hybrid"].update(rates=[2, 4])),
    "phi cut config": lambda c: os.truncate(c / "phi/config.json", 100),
    "phi no config": lambda c: (c / "phi/config.json").unlink(),
}
MESSAGES = {
    "phi missing key": f"1 missing keys, the first {FIRST}",
    "phi unexpected key": "1 unexpected keys, the first blocks.1",
    "phi base key": "1 unexpected keys, the first proj_out.bias",
    "phi misshapen": f"1 misshapen keys, the first {FIRST}",
    "phi truncated": "is damaged",
    "phi empty": "is damaged",
    "phi absent": "no phi.safetensors",
    "phi newer": "φ format 2; this version reads format 1: upgrade",
    "phi newer hybrid": "format 2; this version reads format 1: upgrade",
    "phi without base": "does not say which base model",
    "phi other degree": "misshapen",
    "phi other blocks": "8 missing keys",
    "phi no such block": "missing keys",
    "phi bad rate": "rate 0 does not exist",
    "phi bad rates": "map block numbers to rates",
    "phi cut config": "no readable config.json",
    "phi no config": "no readable config.json",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_phi_is_refused_and_the_base_model_left_alone(copied, damage):
    DAMAGE[damage](copied)
    base = base_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    processors = {name: type(processor) for name, processor in base.attn_processors.items()}
    with pytest.raises(CheckpointError, match=MESSAGES[damage]):
        asg.from_pretrained(copied / "phi", base_model=base)
    assert type(base) is WanTransformer3DModel and "hybrid" not in base.config
    assert {name: type(processor) for name, processor in base.attn_processors.items()} == processors
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


WEIGHTS = "all/diffusion_pytorch_model.hybrid.safetensors"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda c: edit_tensors(c / WEIGHTS, lambda t: t.pop(FIRST)), f"missing keys, the first {FIRST}"),
        (lambda c: edit_tensors(c / WEIGHTS, lambda t: t.pop("proj_out.bias")), "missing keys, the first proj_out"),
        (
            lambda c: edit_tensors(c / WEIGHTS, lambda t: t.update(gate=torch.ones(1))),
            "unexpected keys, the first gate",
        ),
        (lambda c: edit_tensors(c / WEIGHTS, lambda t: t.update({FIRST: t[FIRST][:, 1:].clone()})), "cannot be loaded"),
        (lambda c: os.truncate(c / WEIGHTS, 5000), "cannot be loaded"),
        (lambda c: (c / WEIGHTS).unlink(), "cannot be loaded"),
        (lambda c: edit_json(c / "all/config.json", lambda v: v["hybrid"].update(format=2)), "reads format 1: upgrade"),
        (lambda c: edit_json(c / "all/config.json", lambda v: v["hybrid"].pop("layers")), "has the entries"),
        (lambda c: edit_json(c / "all/config.json", lambda v: v["hybrid"].update(degree=2)), "cannot be loaded"),
        (lambda c: edit_json(c / "all/config.json", lambda v: v.pop("hybrid")), "says nothing of hybrid attention"),
        (lambda c: (c / "all/config.json").write_text("[1"), "no readable config.json"),
    ],
    ids=[
        "no-phi",
        "no-base-key",
        "extra",
        "misshapen",
        "truncated",
        "absent",
        "newer",
        "entry",
        "degree",
        "stock",
        "cut",
    ],
)
def test_damaged_whole_checkpoint_is_refused(copied, damage, message):
    damage(copied)
    with pytest.raises(CheckpointError, match=message):
        asg.from_pretrained(copied / "all")


def test_no_such_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="is no directory, and no hub repository"):
        asg.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no readable config\.json"):
        asg.from_pretrained(tmp_path)


# --- the right base model ------------------------------------------------------------------------------------------


def trained(model):
    """One optimizer step at the paper's fine-tuning rate."""
    parameters = [p for name, p in model.named_parameters() if ".processor." not in name]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    model(*INPUTS, return_dict=False)[0].square().mean().backward()
    optimizer.step()
    return model


@pytest.mark.parametrize(
    "base, message",
    [
        (lambda: trained(base_model()), r"weights of .* differ \(\d+ of 7 parts\)"),
        (lambda: base_model(eps=1e-5), "eps is 1e-05, expected 1e-06"),
        (lambda: base_model(num_layers=4), "num_layers is 4, expected 3"),
        (lambda: base_model(num_attention_heads=1, attention_head_dim=24), "num_attention_heads is 1, expected 2"),
        (lambda: base_model().half(), "float16 cannot be compared"),
    ],
    ids=["trained", "eps", "layers", "heads", "float16"],
)
def test_another_base_model_is_refused(saved, base, message):
    model = base()
    with pytest.raises(CheckpointError, match=message):
        asg.from_pretrained(saved[0] / "phi", base_model=model)
    assert type(model) is WanTransformer3DModel


def test_one_changed_block_is_named(saved):
    model = base_model()
    with torch.no_grad():
        model.blocks[1].ffn.net[2].weight.mul_(1.01)
    with pytest.raises(CheckpointError, match=r"weights of blocks.1 differ \(1 of 7 parts\)"):
        asg.from_pretrained(saved[0] / "phi", base_model=model)


def test_phi_of_a_fine_tuned_model_is_not_put_on_the_original(saved, tmp_path):
    """What is saved is the identity of the weights that the feature maps go with: the model's own at that time."""
    root, _ = saved
    model = trained(asg.from_pretrained(root / "phi"))
    asg.save_pretrained(model, tmp_path, weights="phi")
    with pytest.raises(CheckpointError, match="weights='all'"):
        asg.from_pretrained(tmp_path)


def test_phi_of_a_model_with_a_fused_lora_is_not_put_on_the_original(saved, tmp_path):
    root, _ = saved
    model = asg.from_pretrained(root / "phi")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    for weights in ("all", "phi"):
        with pytest.raises(ModelError, match=r"carries adapters .default.*fuse_lora"):
            asg.save_pretrained(model, tmp_path / weights, weights=weights)
        assert not (tmp_path / weights).exists()
    model.fuse_lora()
    model.unload_lora()
    asg.save_pretrained(model, tmp_path / "phi", weights="phi")
    with pytest.raises(CheckpointError, match=r"weights of blocks.0, blocks.1, blocks.2 differ \(3 of 7 parts\)"):
        asg.from_pretrained(tmp_path / "phi")
    asg.save_pretrained(model, tmp_path / "all")
    assert same_tensors(asg.from_pretrained(tmp_path / "all"), model)


def test_training_only_the_feature_maps_keeps_the_identity(saved, tmp_path):
    root, _ = saved
    model = asg.from_pretrained(root / "phi")
    with torch.no_grad():
        model.blocks[0].attn1.processor.phi_q.biases[0].add_(1)
    asg.save_pretrained(model, tmp_path, weights="phi")
    assert same_tensors(asg.from_pretrained(tmp_path), model)


def test_bad_arguments(saved, tmp_path):
    root, model = saved
    with pytest.raises(ModelError, match="convert_ it first"):
        asg.save_pretrained(base_model(), tmp_path / "new")
    with pytest.raises(ConfigError, match="weights='some' does not exist; expected 'all' or 'phi'"):
        asg.save_pretrained(model, tmp_path / "new", weights="some")
    with pytest.raises(ConfigError, match="base_model is for φ-only"):
        asg.from_pretrained(root / "all", base_model=root / "base")
    with pytest.raises(ConfigError, match=r"torch_dtype.*no effect"):
        asg.from_pretrained(root / "phi", base_model=base_model(), torch_dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="converted already"):
        asg.from_pretrained(root / "phi", base_model=hybrid_model())
    with pytest.raises(ModelError, match="base_model is a WanPipeline; expected a transformer"):
        asg.from_pretrained(root / "phi", base_model=micro_pipeline())
    with pytest.raises(ModelError, match="cannot be loaded as a Wan transformer"):
        asg.from_pretrained(root / "phi", base_model=tmp_path)
    assert not (tmp_path / "new").exists()


# --- whole or absent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["all", "phi"])
def test_a_full_disk_leaves_what_was_there(copied, weights, monkeypatch):
    model = hybrid_model()
    before = files(copied)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    for folder in (copied / weights, copied / "new"):
        with pytest.raises(CheckpointError, match=rf"{folder} cannot be written: .*No space left"):
            asg.save_pretrained(model, folder, weights=weights)
    assert files(copied) == before
    assert sorted(path.name for path in copied.iterdir()) == ["all", "base", "phi"]


def test_a_checkpoint_replaces_a_checkpoint_and_nothing_else(copied, tmp_path):
    model = hybrid_model()
    asg.save_pretrained(model, copied / "all", weights="phi")
    assert set(files(copied / "all")) == {"README.md", "config.json", "phi.safetensors"}
    assert sorted(path.name for path in copied.iterdir()) == ["all", "base", "phi"]

    (copied / "phi" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes.txt beside a hybrid checkpoint, which would be deleted"):
        asg.save_pretrained(model, copied / "phi")
    with pytest.raises(CheckpointError, match="holds no hybrid checkpoint"):
        asg.save_pretrained(model, copied / "base")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        asg.save_pretrained(model, tmp_path / "file")
    assert (copied / "phi" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"


# --- the hub and the card ------------------------------------------------------------------------------------------

PROVENANCE = {
    "errors": {"0": {"2": 0.0625}, "2": {"linear": 0.25}},
    "cost": 0.615,
    "distillation": {"prompts": 400, "lr": 1e-3},
}


class FakeHub:
    """Takes the place of HfApi: a repository is a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.made = root, []

    def __call__(self) -> "FakeHub":
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        from huggingface_hub import RepoUrl

        assert exist_ok
        self.made.append((repo_id, private))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.root / repo_id)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(hub, "HfApi", fake)
    return fake


def test_pushed_whole_checkpoint_loads_by_auto_model_and_by_name(saved, fake_hub, tmp_path, monkeypatch):
    _, model = saved
    url = asg.push_to_hub(model, "someone/wan-hybrid", private=True, provenance=PROVENANCE)
    assert url == "https://huggingface.co/someone/wan-hybrid"
    assert fake_hub.made == [("someone/wan-hybrid", True)]
    repo = tmp_path / "someone" / "wan-hybrid"
    config = json.loads((repo / "config.json").read_text())
    assert config["auto_map"] == {"AutoModel": "modeling_hybrid_wan.HybridWanTransformer3DModel"}

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    auto = AutoModel.from_pretrained(str(repo), trust_remote_code=True)
    assert type(auto) is asg.HybridWanTransformer3DModel
    assert same_tensors(auto, model)

    monkeypatch.setattr(
        "attention_surgery.checkpoint.store.snapshot_download", lambda repo_id, **options: tmp_path / repo_id
    )
    assert same_tensors(asg.from_pretrained("someone/wan-hybrid", revision="main"), model)


def test_pushed_phi_only_checkpoint(saved, fake_hub, tmp_path):
    root, model = saved
    asg.push_to_hub(model, "someone/phi", weights="phi")
    assert fake_hub.made == [("someone/phi", False)]
    assert set(files(tmp_path / "someone" / "phi")) == {"README.md", "config.json", "phi.safetensors"}
    assert same_tensors(asg.from_pretrained(tmp_path / "someone" / "phi", base_model=root / "base"), model)


def test_nothing_is_sent_of_a_model_that_cannot_be_saved(fake_hub):
    with pytest.raises(ModelError, match="convert_ it first"):
        asg.push_to_hub(base_model(), "someone/nothing")
    assert fake_hub.made == []


def test_remote_code_says_how_to_install(tmp_path, monkeypatch):
    code = hub.REMOTE_CODE
    monkeypatch.setitem(__import__("sys").modules, "attention_surgery", None)
    with pytest.raises(ModuleNotFoundError, match="pip install attention-surgery"):
        exec(compile(code, "modeling_hybrid_wan.py", "exec"), {})


def test_card(saved, fake_hub, tmp_path):
    root, model = saved
    asg.push_to_hub(model, "someone/wan-hybrid", provenance=PROVENANCE)
    card = (tmp_path / "someone" / "wan-hybrid" / "README.md").read_text()
    assert "| 0 | R = 2 | 0.0625 |\n| 1 | softmax |  |\n| 2 | linear | 0.2500 |" in card
    assert "2 of 3 self-attention layers" in card and "61.5 %" in card
    assert '"prompts": 400' in card and 'asg.from_pretrained("someone/wan-hybrid")' in card
    assert "pipeline_tag: text-to-video" in card and "base_model" not in card
    assert str(root) not in card  # a path of one machine is nobody else's business

    named = asg.from_pretrained(root / "all")
    named.register_to_config(_name_or_path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    asg.save_pretrained(named, tmp_path / "named")
    card = (tmp_path / "named" / "README.md").read_text()
    assert "\nbase_model: Wan-AI/Wan2.1-T2V-1.3B-Diffusers\n" in card
    assert 'WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"' in card
