"""Attention distillation (Algorithm 1): one teacher trajectory serves every block and every rate of a pass.

A run folder holds `config.json`, `log-PASS.jsonl`, `pass-PASS.pt` (the checkpoint of a pass) and, at the end, `bank/`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import WanTransformer3DModel

from ..checkpoint.identity import weights_digest
from ..errors import DataError, ModelError, RateError, RunError
from ..files import digest, read_json, read_torch, write_json
from ..models import HybridWanTransformer3DModel
from ..processes import join_processes
from ..rates import Rate, check_rates
from .bank import FeatureMapBank, FeatureMapSpec
from .config import DistillConfig
from .measure import mean_errors
from .passes import DistillationPass, checkpoint_path
from .plan import plan_distillation
from .trajectory import token_grid


def distill(
    pipe: Any,
    prompts: Sequence[str],
    rates: Sequence[Rate] = (2, 4, 8),
    *,
    blocks: Sequence[int] | None = None,
    config: DistillConfig | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
) -> FeatureMapBank:
    """Learn φ_q and φ_k for every block at every rate from the teacher's own trajectories, and measure e_ir.

    Only φ trains. The student of each block is fed the teacher's q, k, v at that block and compared with the teacher's
    y there, so blocks and rates do not see each other. Under `accelerate launch` the passes are shared by the
    processes, each of which holds a whole pipeline.

    Args:
        pipe: a `WanPipeline` with a stock transformer; it is not changed.
        prompts: training prompts, the last `config.heldout_prompts` of which are held out for e_ir.
        rates: candidate rates, >= 2 or "linear".
        blocks: block indices; all of them if None.
        config: see `DistillConfig`.
        output_dir: run folder; needed to resume and for several processes. None keeps everything in memory.
        resume: go on in `output_dir` where a run with the same settings stopped. The result is that of an unbroken run.

    Returns:
        A `FeatureMapBank` with a pair of maps and an error for every block and rate.

    Raises:
        DataError: fewer prompts than held out plus one, an empty or repeated one.
        RateError, ModelError: a rate, block or model that cannot be distilled.
        ConfigError: `config.memory_gib` is too small for one block, or a video size that the model does not take.
        RunError: `output_dir` is in use, was made with other settings or another teacher, or cannot be written.
        CheckpointError: the checkpoint to go on from is damaged.
        DivergenceError: a loss, a map or an error that is not finite; the last checkpoint stands.
    """
    config = config or DistillConfig()
    state = join_processes(cpu=pipe._execution_device.type == "cpu")
    blocks, rates = _check(pipe, prompts, rates, blocks, config)
    spec = _spec(pipe, config)
    grid = token_grid(pipe, config)
    plan = plan_distillation(
        blocks,
        rates,
        config,
        tokens=grid[0] * grid[1] * grid[2],
        heads=spec.heads,
        head_dim=spec.head_dim,
        element_size=pipe.transformer.dtype.itemsize,
        world_size=state.num_processes,
    )
    provenance = {
        "base": pipe.transformer.config.get("_name_or_path", ""),
        "weights": weights_digest(pipe.transformer),
        "prompts": len(prompts),
        "prompts_digest": digest(list(prompts)),
        **asdict(config),
    }
    folder = Path(output_dir) if output_dir is not None else None
    if state.num_processes > 1 and folder is None:
        raise RunError("several processes distil through a shared folder; give output_dir")
    if folder is not None and state.is_main_process:
        settings = {"blocks": list(blocks), "rates": list(rates), "plan": plan.passes, **provenance}
        _open(folder, settings, resume)
    state.wait_for_everyone()

    bank = FeatureMapBank(spec, blocks, rates, seed=config.seed, provenance=provenance)
    train, heldout = list(prompts[: -config.heldout_prompts]), list(prompts[-config.heldout_prompts :])
    for index in range(len(plan.passes)):
        if index % state.num_processes == state.process_index:
            DistillationPass(pipe, bank, index, plan, config, grid, folder).run(train, heldout)
    state.wait_for_everyone()
    if folder is not None:
        for index, members in enumerate(plan.passes):
            saved = read_torch(checkpoint_path(folder, index), device="cpu")
            for block in members:
                for rate, pair in bank.pairs[block].items():
                    pair.load_state_dict(saved["maps"][f"{block}/{rate}"])
            bank.errors |= mean_errors(saved["errors"], members, rates)
        if state.is_main_process:
            bank.errors = dict(sorted(bank.errors.items()))
            bank.save_pretrained(folder / "bank")
    bank.errors = dict(sorted(bank.errors.items()))
    return bank


def _check(
    pipe: Any, prompts: Sequence[str], rates: Sequence[Rate], blocks: Sequence[int] | None, config: DistillConfig
) -> tuple[tuple[int, ...], tuple[Rate, ...]]:
    model = pipe.transformer
    if isinstance(model, HybridWanTransformer3DModel):
        raise ModelError("the teacher is converted already; distil from the stock model, or revert_ it first")
    if type(model) is not WanTransformer3DModel:
        raise ModelError(f"cannot distil a {type(model).__name__}; expected diffusers' WanTransformer3DModel")
    if getattr(pipe, "transformer_2", None) is not None:
        raise ModelError("a pipeline of two transformers (Wan 2.2 A14B) is not supported; distil a single-model one")
    rates = check_rates(rates)
    if 1 in rates:
        raise RateError("rate 1 is softmax attention itself; distil rates >= 2 or 'linear'")
    count = len(model.blocks)
    blocks = tuple(range(count)) if blocks is None else tuple(sorted(blocks))
    if not blocks or len(set(blocks)) != len(blocks):
        raise RateError(f"blocks {list(blocks)} are none, or repeat; expected different indices")
    for block in blocks:
        if not 0 <= block < count:
            raise RateError(f"block {block} does not exist; this model has {count} blocks (0-{count - 1})")
    empty = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str) or not prompt.strip()]
    if empty:
        raise DataError(f"prompt {empty[0]} is empty ({len(empty)} of {len(prompts)}); remove it")
    if len(set(prompts)) != len(prompts):
        raise DataError("a prompt is given twice, so that a held-out one could be trained on; remove repeats")
    if len(prompts) <= config.heldout_prompts:
        raise DataError(
            f"got {len(prompts)} prompts, of which {config.heldout_prompts} are held out; give at least "
            f"{config.heldout_prompts + 1}, or lower heldout_prompts"
        )
    return blocks, rates


def _spec(pipe: Any, config: DistillConfig) -> FeatureMapSpec:
    return FeatureMapSpec(
        heads=pipe.transformer.config.num_attention_heads,
        head_dim=pipe.transformer.config.attention_head_dim,
        degree=config.degree,
        layers=config.layers,
        normalizer=config.normalizer,
        pattern=config.pattern,
    )


def _open(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Claim `folder` for these settings, or check that it is theirs."""
    settings = json.loads(json.dumps(settings))
    path = folder / "config.json"
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} is not empty and holds no distillation run; give another output_dir")
        write_json(path, settings)
        return
    if not resume:
        raise RunError(f"{folder} holds a distillation run; pass resume=True to go on, or another output_dir")
    before = read_json(path)
    before.setdefault("weights", settings["weights"])  # older folders do not say
    changed = [
        f"{key}: {before.get(key)!r} → {settings.get(key)!r}"
        for key in sorted(before.keys() | settings.keys())
        if before.get(key) != settings.get(key)
    ]
    if changed:
        raise RunError(
            f"{folder} was made with other settings ({'; '.join(changed)}); use those, or another output_dir"
        )
