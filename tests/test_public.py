"""The public surface: the fixed names, and nothing else under `attention_surgery`."""

import inspect
import subprocess
import sys

import attention_surgery as asg

FIXED = {
    "FeatureMap": ["heads", "head_dim", "degree", "layers"],
    "hybrid_attention": ["q", "k", "v", "phi_q", "phi_k", "rate", "normalizer", "pattern", "grid", "backend"],
    "softmax_token_mask": ["n", "rate", "pattern", "heads", "grid"],
    "profile": ["model_or_config", "num_frames", "height", "width", "rates"],
    "block_costs": ["model_or_config", "rates", "unit"],
    "HybridConfig": ["rates", "degree", "layers", "normalizer", "pattern"],
    "convert_": ["model", "config"],
    "revert_": ["model"],
    "disabled": ["model"],
    "DistillConfig": ["loss", "lr", "num_inference_steps", "guidance_scale"],
    "distill": ["pipe", "prompts", "rates", "blocks", "config", "output_dir", "resume"],
    "select_rates": ["errors", "costs", "budget"],
    "pareto_front": ["errors", "costs"],
    "homogeneous_rates": ["errors", "rate", "blocks"],
    "FinetuneConfig": ["lr", "batch_size", "max_steps", "trainable", "objective"],
    "finetune": ["pipe", "dataset", "config", "output_dir", "resume"],
    "save_pretrained": ["model", "directory", "weights"],
    "from_pretrained": ["repo_or_dir", "base_model"],
    "push_to_hub": ["model", "repo_id", "weights", "private"],
    "tiny_wan": [],
    "vbench_scores": [],
    "vbench2_scores": [],
}


def test_fixed_names_take_the_fixed_arguments():
    for name, arguments in FIXED.items():
        parameters = inspect.signature(getattr(asg, name)).parameters
        missing = [argument for argument in arguments if argument not in parameters]
        assert not missing, f"{name} lacks {missing}"
    naive = inspect.signature(asg.ops.naive.hybrid_attention).parameters
    assert [name for name in FIXED["hybrid_attention"] if name not in naive] == []
    assert callable(asg.shapes.render) and callable(asg.shapes.judge)


def test_everything_exported_is_there_sorted_and_documented():
    assert asg.__all__ == sorted(asg.__all__)
    for name in asg.__all__:
        value = getattr(asg, name)
        assert name == "Rate" or inspect.getdoc(value), f"{name} has no docstring"


def test_in_place_verbs_return_nothing():
    for name in ("convert_", "revert_"):
        assert inspect.signature(getattr(asg, name)).return_annotation is None


def test_errors_are_one_tree():
    from attention_surgery import errors

    classes = [value for value in vars(errors).values() if inspect.isclass(value)]
    assert all(issubclass(value, asg.SurgeryError) for value in classes)
    assert issubclass(errors.RateError, ValueError) and not issubclass(errors.CheckpointError, ValueError)


def test_help_waits_for_no_heavy_import():
    code = "import sys, attention_surgery.cli; print(*(x for x in sys.modules if '.' not in x))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "tyro" in found and not {"torch", "diffusers", "transformers", "scipy", "matplotlib", "av"} & set(found)
