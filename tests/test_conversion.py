"""Conversion: exact both ways, and everything that diffusers does to a Wan model goes on working on a hybrid one."""

import copy
import inspect
from collections.abc import Iterator

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.transformers import transformer_wan
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from diffusers.training_utils import EMAModel
from micro_wan import micro_pipeline, micro_transformer
from peft import LoraConfig

import attention_surgery as asg
from attention_surgery.errors import ConfigError, ModelError, RateError, TensorError
from attention_surgery.layers import processor as processor_module
from attention_surgery.layers.processor import HybridAttnProcessor
from attention_surgery.layers.projections import project_qkv
from attention_surgery.models import hybrid_processors
from attention_surgery.ops import eager, naive

CONFIG = asg.HybridConfig({0: 2, 2: "linear"})
LATTICE = asg.HybridConfig({0: 2, 1: 4, 2: "linear"}, degree=3, layers=1, normalizer="max", pattern="lattice")
MODELS = {
    "T2V": {},
    "I2V": {"in_channels": 8, "image_dim": 20, "added_kv_proj_dim": 24},
    "TI2V": {"in_channels": 4},  # one timestep per token
}


def model_of(kind: str = "T2V") -> WanTransformer3DModel:
    torch.manual_seed(0)
    return micro_transformer(**MODELS[kind])


def inputs_of(kind: str = "T2V", *, dtype=torch.float32, batch=2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    given = {
        "hidden_states": draw(batch, MODELS[kind].get("in_channels", 4), 3, 8, 10),
        "timestep": torch.tensor([500, 250])[:batch],
        "encoder_hidden_states": draw(batch, 7, 16),
    }
    if kind == "I2V":
        given["encoder_hidden_states_image"] = draw(batch, 5, 20)
    if kind == "TI2V":
        given["timestep"] = torch.randint(0, 1000, (batch, 3 * 4 * 5), generator=generator)
    return given


def run(model, given=None, **changes):
    with torch.no_grad():
        return model(**(given or inputs_of()) | changes, return_dict=False)[0]


def snapshot(model) -> dict[str, object]:
    """All that a conversion could change."""
    return {
        "class": type(model),
        "config": dict(model.config),
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "processors": {name: id(processor) for name, processor in model.attn_processors.items()},
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "hooks": {name: len(module._forward_pre_hooks) for name, module in model.named_modules()},
    }


def assert_unchanged(model, before) -> None:
    after = snapshot(model)
    state, expected = after.pop("state"), before["state"]
    assert after == {name: value for name, value in before.items() if name != "state"}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.fixture
def hybrid() -> WanTransformer3DModel:
    model = model_of()
    asg.convert_(model, CONFIG)
    return model


# --- what convert_ does --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_base_keys_blocks_and_cross_attention_are_untouched(kind):
    model = model_of(kind)
    before = snapshot(model)
    asg.convert_(model, CONFIG)
    state = model.state_dict()
    delta = state.keys() - before["state"].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in before["state"].items())
    assert {".".join(name.split(".")[:4]) for name in delta} == {
        "blocks.0.attn1.processor",
        "blocks.2.attn1.processor",
    }
    assert all(type(block) is WanTransformerBlock for block in model.blocks)
    processors = {name: id(processor) for name, processor in model.attn_processors.items()}
    changed = {name for name in processors if processors[name] != before["processors"][name]}
    assert changed == {"blocks.0.attn1.processor", "blocks.2.attn1.processor"}
    assert type(model) is asg.HybridWanTransformer3DModel and isinstance(model, WanTransformer3DModel)
    assert model.hybrid_config == CONFIG
    assert {index: p.rate for index, p in hybrid_processors(model).items()} == {0: 2, 2: "linear"}


@pytest.mark.parametrize("config", [CONFIG, LATTICE], ids=["stride", "lattice"])
@pytest.mark.parametrize("kind", MODELS)
def test_forward_is_equation_5_in_every_wan_model(kind, config, monkeypatch):
    """The whole model, against the same one with the oracle in the operator's place."""
    model, given = model_of(kind).double(), inputs_of(kind, dtype=torch.float64)
    dense = run(model, given)
    asg.convert_(model, config)
    got = run(model, given)

    def oracle(*args, attention_backend, projection, key_source, **options):
        return projection(naive.hybrid_attention(*args, **options).flatten(2))

    monkeypatch.setattr(processor_module, "hybrid_attention", oracle)
    torch.testing.assert_close(got, run(model, given))
    assert got.isfinite().all() and not torch.allclose(got, dense, rtol=1e-3)


@pytest.mark.parametrize("config", [CONFIG, LATTICE], ids=["stride", "lattice"])
@pytest.mark.parametrize("kind", MODELS)
def test_revert_is_exact(kind, config):
    model, given = model_of(kind), inputs_of(kind)
    before, dense = snapshot(model), run(model, given)
    asg.convert_(model, config)
    assert not torch.equal(run(model, given), dense)
    asg.revert_(model)
    before["processors"] = {name: id(processor) for name, processor in model.attn_processors.items()}
    assert_unchanged(model, before)
    assert all(type(processor) is WanAttnProcessor for processor in model.attn_processors.values())
    assert torch.equal(run(model, given), dense)
    asg.convert_(model, config)  # and again


@pytest.mark.parametrize("config", [CONFIG, LATTICE], ids=["stride", "lattice"])
@pytest.mark.parametrize("kind", MODELS)
def test_disabled_is_exact(kind, config):
    model, given = model_of(kind), inputs_of(kind)
    dense = run(model, given)
    asg.convert_(model, config)
    converted = run(model, given)
    with asg.disabled(model):
        assert torch.equal(run(model, given), dense)
        with asg.disabled(model):
            assert torch.equal(run(model, given), dense)
        assert torch.equal(run(model, given), dense)
    assert torch.equal(run(model, given), converted)
    with pytest.raises(ZeroDivisionError), asg.disabled(model):
        _ = 1 // 0
    assert torch.equal(run(model, given), converted)


def test_gradients_are_exact_while_disabled(hybrid):
    stock = model_of()
    for model in (stock, hybrid):
        with asg.disabled(model) if model is hybrid else torch.enable_grad():
            model(**inputs_of(), return_dict=False)[0].square().mean().backward()
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter.grad, hybrid.get_parameter(name).grad), name
    assert all(p.grad is None for name, p in hybrid.named_parameters() if ".processor." in name)


def test_phi_takes_the_layers_dtype_device_and_mode():
    model = model_of().to(torch.bfloat16).train()
    asg.convert_(model, CONFIG)
    processor = model.blocks[0].attn1.processor
    assert {p.dtype for p in processor.parameters()} == {torch.bfloat16}
    assert processor.training and all(p.requires_grad for p in processor.parameters())
    with torch.device("meta"):
        shell = micro_transformer()
    asg.convert_(shell, CONFIG)
    assert all(p.is_meta for p in shell.parameters())


def test_the_lattice_follows_the_video(hybrid):
    """The grid is that of the latents at hand, also when it changes, and in a copy of the model."""
    model = model_of()
    asg.convert_(model, LATTICE)
    run(model)
    assert model.blocks[1].attn1.processor.grid == (3, 4, 5)
    twin = copy.deepcopy(model)
    run(twin, hidden_states=torch.randn(2, 4, 5, 4, 6))
    assert twin.blocks[1].attn1.processor.grid == (5, 2, 3)
    assert model.blocks[1].attn1.processor.grid == (3, 4, 5)


def test_config_round_trip():
    for config in (CONFIG, LATTICE):
        assert asg.HybridConfig.from_dict(config.to_dict()) == config
    assert asg.HybridConfig({3: 2, 1: "linear", 0: 1}).rates == {1: "linear", 3: 2}
    with pytest.raises(AttributeError):
        CONFIG.degree = 4


# --- bad input leaves everything as it was -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: {3: 2}, RateError, r"block 3 does not exist; this model has 3 blocks \(0-2\)"),
        (lambda: {0: 2, 31: 2}, RateError, "block 31 does not exist"),
    ],
)
def test_a_block_that_does_not_exist(make, error, message):
    model = model_of()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        asg.convert_(model, asg.HybridConfig(make()))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "rates, options, error, message",
    [
        ({-1: 2}, {}, RateError, "block -1 does not exist; expected an index >= 0"),
        ({"0": 2}, {}, RateError, "block '0' does not exist"),
        ({True: 2}, {}, RateError, "block True does not exist"),
        ({0: 0}, {}, RateError, "rate 0 does not exist"),
        ({0: 1.5}, {}, RateError, r"rate 1\.5 does not exist"),
        ({0: "log"}, {}, RateError, "rate 'log' does not exist"),
        ({}, {}, RateError, "no block is converted"),
        ({0: 1, 1: 1}, {}, RateError, "no block is converted"),
        ({0: 2}, {"degree": 0}, ConfigError, "degree is 0; expected an integer >= 1"),
        ({0: 2}, {"layers": 1.5}, ConfigError, r"layers is 1\.5; expected an integer >= 1"),
        ({0: 2}, {"normalizer": "sum"}, ConfigError, "normalizer 'sum' does not exist"),
        ({0: 2}, {"pattern": "grid"}, ConfigError, "pattern 'grid' does not exist"),
    ],
)
def test_bad_configs(rates, options, error, message):
    with pytest.raises(error, match=message):
        asg.HybridConfig(rates, **options)


def test_a_converted_model_is_not_converted_again(hybrid):
    before = snapshot(hybrid)
    with pytest.raises(ModelError, match=r"converted already.*revert_ it first"):
        asg.convert_(hybrid, CONFIG)
    assert_unchanged(hybrid, before)


def test_models_that_are_not_supported():
    with torch.device("meta"):
        vace = WanVACETransformer3DModel(num_attention_heads=2, attention_head_dim=12, num_layers=1, vace_layers=[0])
    for model, name in [
        (vace, "WanVACETransformer3DModel"),
        (torch.nn.Linear(2, 2), "Linear"),
        (micro_pipeline(), "WanPipeline"),
        (torch.compile(model_of()), "OptimizedModule"),
    ]:
        with pytest.raises(ModelError, match=f"cannot convert a {name}; expected diffusers' WanTransformer3DModel"):
            asg.convert_(model, CONFIG)


def test_a_processor_that_is_not_stock_is_not_overwritten():
    class OtherProcessor(WanAttnProcessor):
        pass

    model = model_of()
    model.blocks[2].attn1.set_processor(OtherProcessor())
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"blocks\.2\.attn1 has processor OtherProcessor; expected the stock"):
        asg.convert_(model, CONFIG)
    assert_unchanged(model, before)


def test_a_stock_model_cannot_be_reverted_or_disabled():
    model = model_of()
    before = snapshot(model)
    with pytest.raises(ModelError, match="cannot revert a WanTransformer3DModel: it is not converted"):
        asg.revert_(model)
    with pytest.raises(ModelError, match="no hybrid layer to disable; convert_ it first"), asg.disabled(model):
        pass
    assert_unchanged(model, before)


def test_no_masks_and_no_context(hybrid):
    attn, x = hybrid.blocks[0].attn1, torch.zeros(1, 4, 24)
    for arguments in ({"encoder_hidden_states": x}, {"attention_mask": torch.ones(1, 4)}):
        with pytest.raises(ModelError, match="unmasked self-attention; it got a mask or a context"):
            attn.processor(attn, x, **arguments)


# --- parallelism ---------------------------------------------------------------------------------------------------


def test_context_parallelism_is_refused(hybrid, tmp_path):
    from diffusers import ContextParallelConfig

    config = ContextParallelConfig(ring_degree=2)
    before = snapshot(hybrid)
    with pytest.raises(ModelError, match="does not run under context or tensor parallelism"):
        hybrid.enable_parallelism(config=config)
    assert_unchanged(hybrid, before)
    hybrid.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not run under context or tensor parallelism"):
        type(hybrid).from_pretrained(tmp_path, parallel_config=config)
    hybrid.blocks[0].attn1.processor._parallel_config = config  # however it got there
    with pytest.raises(ModelError, match="does not run under context parallelism"):
        run(hybrid)


def test_a_model_under_context_parallelism_is_not_converted():
    model = model_of()
    model._parallel_config = object()
    before = snapshot(model)
    with pytest.raises(ModelError, match="under context or tensor parallelism; convert before"):
        asg.convert_(model, CONFIG)
    assert_unchanged(model, before)


# --- the stock pipeline --------------------------------------------------------------------------------------------


def generate(pipe, **changes):
    options = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "max_sequence_length": 16}
    with torch.random.fork_rng(devices=[]):
        generator = torch.Generator().manual_seed(0)
        return pipe("a red ball", **options | changes, generator=generator, output_type="pt").frames


@pytest.fixture
def pipe():
    pipe = micro_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_stock_pipeline_end_to_end(pipe):
    dense = generate(pipe)
    asg.convert_(pipe.transformer, CONFIG)
    video = generate(pipe)
    assert video.shape == dense.shape == (1, 5, 3, 32, 32)
    assert video.isfinite().all() and not torch.equal(video, dense)
    assert torch.equal(video, generate(pipe))
    with asg.disabled(pipe.transformer):
        assert torch.equal(generate(pipe), dense)
    asg.revert_(pipe.transformer)
    assert torch.equal(generate(pipe), dense)


def test_a_pipeline_of_two_transformers(pipe):
    """Wan2.2 has one for the noisy steps and one for the rest; each is converted on its own."""
    pipe.register_modules(transformer_2=model_of())
    pipe.register_to_config(boundary_ratio=0.9)
    dense = generate(pipe)
    asg.convert_(pipe.transformer_2, CONFIG)
    second = generate(pipe)
    asg.convert_(pipe.transformer, LATTICE)
    assert len({tuple(x.flatten().tolist()) for x in (dense, second, generate(pipe))}) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = model_of()
    asg.convert_(model, LATTICE)
    exact = run(model)
    half = run(copy.deepcopy(model).to(dtype), inputs_of(dtype=dtype))
    assert half.dtype == dtype
    assert ((half.float() - exact).norm() / exact.norm()) < 0.02
    with torch.autocast("cpu", dtype=dtype):
        mixed = run(model)
    assert ((mixed.float() - exact).norm() / exact.norm()) < 0.02


def test_no_uninitialised_memory_is_read(poisoned_memory):
    for config in (CONFIG, LATTICE):
        model = model_of()
        asg.convert_(model, config)
        y = model(**inputs_of(), return_dict=False)[0]
        y.sum().backward()
        assert y.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """PyTorch fills memory that it hands out uninitialised with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_set_attention_backend_reaches_the_softmax_part(hybrid, monkeypatch):
    backends = []
    dispatch = eager.dispatch_attention_fn

    def record(q, k, v, *args, **kwargs):
        backends.append((k.shape[1], kwargs["backend"]))
        return dispatch(q, k, v, *args, **kwargs)

    monkeypatch.setattr(eager, "dispatch_attention_fn", record)
    expected = run(hybrid)
    assert backends == [(30, None)]  # block 0 at R = 2: 30 of 60 tokens; block 2 has no softmax part
    hybrid.set_attention_backend("_native_math")
    torch.testing.assert_close(run(hybrid), expected)
    assert backends[1:] == [(30, "_native_math")]
    asg.revert_(hybrid)
    assert hybrid.blocks[0].attn1.processor._attention_backend == "_native_math"
    asg.convert_(hybrid, CONFIG)
    assert hybrid.blocks[0].attn1.processor._attention_backend == "_native_math"


# --- training ------------------------------------------------------------------------------------------------------


def gradients(model):
    model.zero_grad()
    y = model(**inputs_of(), return_dict=False)[0]
    y.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("normalizer", ["max", "mean"])
def test_gradient_checkpointing_gives_the_same_gradients(normalizer):
    model = model_of().train()
    asg.convert_(model, asg.HybridConfig({0: 2, 1: 4, 2: "linear"}, normalizer=normalizer, pattern="lattice"))
    plain = gradients(model)
    assert all(grad.norm() > 0 for name, grad in plain.items() if ".processor." in name)
    model.enable_gradient_checkpointing()
    calls = []
    model.blocks[0].attn1.processor.register_forward_hook(lambda *args: calls.append(1))
    again = gradients(model)
    assert len(calls) == 2  # once, and once more in the backward
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, msg=name)


def test_ema_model(hybrid, tmp_path):
    ema = EMAModel(
        hybrid.parameters(), decay=0.5, model_cls=type(hybrid), model_config=hybrid.config, use_ema_warmup=False
    )
    phi = hybrid.blocks[0].attn1.processor.phi_q.weights[0]
    before = phi.detach().clone()
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.add_(1.0)
    ema.step(hybrid.parameters())
    moved = ema.get_decay(ema.optimization_step)
    ema.store(hybrid.parameters())
    ema.copy_to(hybrid.parameters())
    torch.testing.assert_close(phi.detach(), before + (1 - moved))
    ema.restore(hybrid.parameters())
    torch.testing.assert_close(phi.detach(), before + 1)
    ema.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, model_cls=type(hybrid))
    assert again.optimization_step == 1
    assert all(torch.equal(*pair) for pair in zip(again.shadow_params, ema.shadow_params, strict=True))
    loaded = asg.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.blocks[0].attn1.processor.phi_q.weights[0].detach(), before + (1 - moved))


# --- compile, offload, casting, quantisation -----------------------------------------------------------------------


def test_compile_repeated_blocks_without_graph_breaks():
    torch.compiler.reset()
    model = model_of()
    asg.convert_(model, LATTICE)
    expected = run(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(model), expected)
    y = model(**inputs_of(), return_dict=False)[0]
    y.square().mean().backward()
    assert all(p.grad.norm() > 0 for p in model.blocks[0].attn1.processor.parameters())


def test_compile_repeated_blocks_with_every_rate_in_one_model():
    """Blocks share one compiled frame; each rate compiles once, below the limit at which fullgraph fails."""
    torch.compiler.reset()
    model = micro_transformer(num_layers=14)
    rates = dict(enumerate([1, 2, 3, 4, 6, 8, "linear"] * 2))
    asg.convert_(model, asg.HybridConfig(rates))
    expected = run(model)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(model), expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("config", [CONFIG, LATTICE], ids=["stride", "lattice"])
def test_group_offload(config, offload_type, tmp_path, poisoned_memory):
    """To disk: whatever is not brought back in time is NaN."""
    model = model_of()
    asg.convert_(model, config)
    expected = run(model)
    model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1 if offload_type == "block_level" else None,
        offload_to_disk_path=str(tmp_path),
    )
    assert model.blocks[0].attn1.processor.phi_q.weights[0].isnan().any()  # it is away
    torch.testing.assert_close(run(model), expected)
    assert model.blocks[0].attn1.processor.phi_q.weights[0].isnan().any()
    torch.testing.assert_close(run(model), expected)


def test_layerwise_casting():
    model = model_of().to(torch.bfloat16)
    asg.convert_(model, CONFIG)
    given = inputs_of(dtype=torch.bfloat16)
    expected = run(model, given)
    phi = {name: p.clone() for name, p in model.named_parameters() if ".processor." in name}
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    got = run(model, given)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert ((got - expected).float().norm() / expected.float().norm()) < 0.2
    assert all(torch.equal(model.get_parameter(name), p) for name, p in phi.items())  # φ is not cast


def test_torchao_int8_weight_only(hybrid, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    expected = run(hybrid)
    phi = {name: p.clone() for name, p in hybrid.named_parameters() if ".processor." in name}
    quantization.quantize_(hybrid, quantization.Int8WeightOnlyConfig())
    assert type(hybrid.blocks[0].attn1.to_q.weight.data) is not torch.Tensor
    got = run(hybrid)
    assert 0 < ((got - expected).norm() / expected.norm()) < 0.05
    assert all(torch.equal(hybrid.get_parameter(name), p) for name, p in phi.items())
    with pytest.raises(ModelError, match="save feature maps before quantising"):
        asg.save_pretrained(hybrid, tmp_path / "phi", weights="phi")
    quantised = model_of()
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    asg.convert_(quantised, CONFIG)  # in the other order
    quantised.load_state_dict(phi, strict=False)
    torch.testing.assert_close(run(quantised), got)


def test_fused_projections(hybrid, tmp_path):
    expected = run(hybrid)
    hybrid.fuse_qkv_projections()
    assert hybrid.blocks[0].attn1.fused_projections and hybrid.blocks[0].attn2.fused_projections
    torch.testing.assert_close(run(hybrid), expected)
    with pytest.raises(ModelError, match="unfuse_qkv_projections"):
        asg.save_pretrained(hybrid, tmp_path / "fused")
    hybrid.unfuse_qkv_projections()
    torch.testing.assert_close(run(hybrid), expected)
    fused = model_of()
    fused.fuse_qkv_projections()
    asg.convert_(fused, CONFIG)
    fused.load_state_dict({k: v for k, v in hybrid.state_dict().items() if ".processor." in k}, strict=False)
    torch.testing.assert_close(run(fused), expected)


# --- caches --------------------------------------------------------------------------------------------------------


def counted(model) -> list[int]:
    """Appends the block of every hybrid attention that is computed."""
    calls: list[int] = []
    for index, processor in hybrid_processors(model).items():
        processor.register_forward_hook(lambda *args, index=index: calls.append(index))
    return calls


def test_first_block_cache(pipe):
    asg.convert_(pipe.transformer, LATTICE)
    expected = generate(pipe)
    calls = counted(pipe.transformer)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    torch.testing.assert_close(generate(pipe), expected)
    assert (calls.count(0), calls.count(2)) == (6, 6)  # 3 steps, with and without the prompt
    calls.clear()
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    cached = generate(pipe)
    assert (calls.count(0), calls.count(1), calls.count(2)) == (6, 2, 2)  # only the first step goes past block 0
    assert cached.isfinite().all() and not torch.equal(cached, expected)
    pipe.transformer.disable_cache()
    assert torch.equal(generate(pipe), expected)


def test_pyramid_attention_broadcast(pipe):
    asg.convert_(pipe.transformer, LATTICE)
    expected = generate(pipe)
    calls = counted(pipe.transformer)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    pipe.transformer.enable_cache(config)
    broadcast = generate(pipe)
    assert 0 < calls.count(1) < 6
    assert broadcast.isfinite().all() and not torch.equal(broadcast, expected)
    pipe.transformer.disable_cache()
    assert torch.equal(generate(pipe), expected)


def test_taylor_seer_cache(pipe):
    asg.convert_(pipe.transformer, LATTICE)
    expected = generate(pipe, num_inference_steps=5)
    calls = counted(pipe.transformer)
    pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=2, cache_identifiers=[r"blocks\.\d+\.attn1"]))
    predicted = generate(pipe, num_inference_steps=5)
    assert 0 < len(calls) < 30
    assert predicted.isfinite().all() and not torch.equal(predicted, expected)


# --- LoRA ----------------------------------------------------------------------------------------------------------

NATIVE = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
LAYERS = [
    *[f"{attn}.{layer}" for attn in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")],
    "ffn.net.0.proj",
    "ffn.net.2",
]


def native_name(layer: str) -> str:
    if layer.startswith("ffn"):
        return "ffn.0" if layer == "ffn.net.0.proj" else "ffn.2"
    attn, _, part = layer.partition(".")
    return f"{NATIVE[attn]}.{NATIVE[part]}"


def lora_file(style: str) -> dict[str, torch.Tensor]:
    """One LoRA of rank 2 and scale 1 on every linear layer of every block, as three programs write it."""
    model, generator = model_of(), torch.Generator().manual_seed(2)
    state = {}
    for block in range(3):
        for layer in LAYERS:
            weight = model.get_submodule(f"blocks.{block}.{layer}").weight
            a = torch.randn(2, weight.shape[1], generator=generator) * 0.3
            b = torch.randn(weight.shape[0], 2, generator=generator) * 0.3
            if style == "diffusers":
                name = f"transformer.blocks.{block}.{layer}"
                state |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            elif style == "comfyui":
                name = f"diffusion_model.blocks.{block}.{native_name(layer)}"
                state |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            else:
                name = f"lora_unet_blocks_{block}_{native_name(layer).replace('.', '_')}"
                state |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
                state[f"{name}.alpha"] = torch.tensor(2.0)
    return state


@pytest.mark.parametrize("style", ["diffusers", "comfyui", "kohya"])
def test_lora_load_fuse_unfuse_unload(pipe, style):
    stock = micro_pipeline()
    stock.load_lora_weights(lora_file(style))
    stock_with_lora = run(stock.transformer)
    model = pipe.transformer
    asg.convert_(model, CONFIG)
    plain, phi = run(model), {n: p.clone() for n, p in model.named_parameters() if ".processor." in n}

    pipe.load_lora_weights(lora_file(style))
    loaded = run(model)
    assert ((loaded - plain).norm() / plain.norm()) > 0.01
    with asg.disabled(model):
        assert torch.equal(run(model), stock_with_lora)
    adapted = {name.rsplit(".lora_A", 1)[0] for name in model.state_dict() if ".lora_A." in name}
    assert adapted == {f"blocks.{block}.{layer}" for block in range(3) for layer in LAYERS}

    pipe.fuse_lora()
    torch.testing.assert_close(run(model), loaded, rtol=1e-4, atol=1e-4)
    pipe.unfuse_lora()
    torch.testing.assert_close(run(model), loaded, rtol=1e-4, atol=1e-4)
    pipe.unload_lora_weights()
    torch.testing.assert_close(run(model), plain, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in phi.items())
    assert model.hybrid_config == CONFIG and len(hybrid_processors(model)) == 2


def test_convert_and_revert_with_a_lora_loaded(pipe):
    pipe.load_lora_weights(lora_file("diffusers"))
    adapted = run(pipe.transformer)
    asg.convert_(pipe.transformer, CONFIG)
    assert not torch.equal(run(pipe.transformer), adapted)
    with asg.disabled(pipe.transformer):
        assert torch.equal(run(pipe.transformer), adapted)
    asg.revert_(pipe.transformer)
    assert torch.equal(run(pipe.transformer), adapted)


def test_peft_freezes_phi(hybrid):
    """A fact of peft to build on: whoever trains φ beside an adapter has to say so."""
    hybrid.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert not any(p.requires_grad for p in hybrid.blocks[0].attn1.processor.parameters())


# --- the copied order of operations --------------------------------------------------------------------------------


def test_projections_are_those_of_diffusers(hybrid):
    """The processor repeats the stock order of operations; a diffusers that changes it shows here."""
    q = torch.randn(2, 60, 24)
    attn, rotary = hybrid.blocks[0].attn1, hybrid.rope(inputs_of()["hidden_states"])
    got = {}

    def take(query, key, value, **kwargs):
        got["stock"] = query, key, value
        return query

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_wan, "dispatch_attention_fn", take)
        WanAttnProcessor()(attn, q, None, None, rotary)
    for ours, stock in zip(project_qkv(attn, q, rotary)[:3], got["stock"], strict=True):
        assert torch.equal(ours, stock)
    stock = inspect.signature(WanAttnProcessor.__call__).parameters
    assert list(inspect.signature(HybridAttnProcessor.forward).parameters) == list(stock)


def test_a_wrong_feature_map_is_named(hybrid):
    hybrid.blocks[0].attn1.processor.phi_k = asg.FeatureMap(2, 12, degree=3)
    with pytest.raises(TensorError, match="phi_k has 36 features; expected 24, as phi_q"):
        run(hybrid)
