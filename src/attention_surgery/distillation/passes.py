"""One pass over the teacher trajectories: updates, held-out errors, and the checkpoint that makes it resumable."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, DivergenceError
from ..files import append_jsonl, digest, read_jsonl, read_torch, write_text, write_torch
from ..layers.capture import capture
from ..ops.tokens import Grid
from ..progress import progress
from ..rates import Rate
from .bank import FeatureMapBank, FeatureMapPair
from .config import DistillConfig
from .losses import attention_loss, value_loss
from .measure import Item, mean_errors, student, trajectory_errors
from .plan import DistillPlan
from .trajectory import run_teacher


def checkpoint_path(folder: Path, index: int) -> Path:
    """Where pass `index` keeps its state."""
    return folder / f"pass-{index:03d}.pt"


class DistillationPass:
    """The blocks of one pass: their maps, optimizer, cache and checkpoint."""

    def __init__(
        self,
        pipe: Any,
        bank: FeatureMapBank,
        index: int,
        plan: DistillPlan,
        config: DistillConfig,
        grid: Grid,
        folder: Path | None,
    ) -> None:
        self.pipe, self.bank, self.index, self.plan, self.config, self.grid = pipe, bank, index, plan, config, grid
        self.folder = folder
        self.blocks = plan.passes[index]
        self.device = pipe._execution_device
        self.pairs: dict[tuple[int, Rate], FeatureMapPair] = {
            (block, rate): pair for block in self.blocks for rate, pair in bank.pairs[block].items()
        }
        for pair in self.pairs.values():
            pair.to(self.device)
        parameters = [parameter for pair in self.pairs.values() for parameter in pair.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=config.lr)
        self.trajectory = 0  # trajectories trained on
        self.update = 0  # optimizer steps taken
        self.measured = 0  # held-out trajectories measured
        self.errors: dict[str, list[float]] = {f"{block}/{rate}": [] for block, rate in self.pairs}
        self.cache: dict[int, list[Item]] = {block: [] for block in self.blocks}

    def run(self, train: list[str], heldout: list[str]) -> None:
        """Train on the trajectories and measure on the held-out ones, from where the checkpoint stands."""
        self._load()
        m, total = self.config.batch_size, self.config.num_trajectories
        label = f"distil pass {self.index + 1}/{len(self.plan.passes)}"
        steps = self.config.num_inference_steps
        with progress(label, total * steps, done=self.trajectory * steps) as advance:
            while self.trajectory < total:
                first = self.trajectory * m
                batch = [train[(first + i) % len(train)] for i in range(m)]
                self._train_on(batch, advance)
                self.trajectory += 1
                if self.trajectory % self.config.checkpoint_every == 0 or self.trajectory == total:
                    self._save()
        batches = [heldout[i : i + m] for i in range(0, len(heldout), m)]
        with progress(f"measure pass {self.index + 1}", len(batches), done=self.measured) as advance:
            while self.measured < len(batches):
                self._measure_on(batches[self.measured])
                self.measured += 1
                self._save()
                advance("")
        self.bank.errors |= mean_errors(self.errors, self.blocks, self.bank.rates)
        for pair in self.pairs.values():
            pair.to("cpu").requires_grad_(False)

    def _train_on(self, prompts: list[str], advance: Callable[[str], None]) -> None:
        """One teacher trajectory: fill the cache, update on it whenever it is full, and at the end."""
        note = ""

        def on_step_end(step: int) -> None:
            nonlocal note
            last = step == self.config.num_inference_steps - 1
            full = len(self.cache[self.blocks[0]]) + self.config.forwards_per_step > self.plan.window
            if full or last:
                note = f"loss {self._update_on_cache(step, prompts):.4f}"
            advance(note)

        seed = self._seed("train", self.trajectory)
        with capture(self.pipe.transformer, self.blocks, self._keep):
            run_teacher(self.pipe, prompts, seed=seed, config=self.config, on_step_end=on_step_end)

    def _keep(self, block: int, *tensors: Tensor) -> None:
        self.cache[block].append(tuple(tensor.detach() for tensor in tensors))  # type: ignore[arg-type]

    def _update_on_cache(self, step: int, prompts: list[str]) -> float:
        """U rounds of updates over the cached forwards in random order; every block and rate takes each of them."""
        count = len(self.cache[self.blocks[0]])
        generator = torch.Generator().manual_seed(self._seed("order", self.trajectory * 1000 + step))
        seen: dict[str, list[Tensor]] = {key: [] for key in self.errors}
        for _ in range(self.config.updates_per_batch):
            for item in torch.randperm(count, generator=generator).tolist():
                self._set_lr()
                self.optimizer.zero_grad(set_to_none=True)
                for (block, rate), pair in self.pairs.items():
                    loss = self._loss(pair, rate, self.cache[block][item], generator)
                    loss.backward()
                    seen[f"{block}/{rate}"].append(loss.detach())
                self.optimizer.step()
                self.update += 1
        means = {key: torch.stack(values).mean().item() for key, values in seen.items()}
        for (block, rate), pair in self.pairs.items():
            loss, whole = means[f"{block}/{rate}"], all(tensor.isfinite().all() for tensor in pair.parameters())
            if not (math.isfinite(loss) and whole):
                raise DivergenceError(
                    f"the distillation of block {block} at rate {rate} has loss {loss} and "
                    f"{'finite' if whole else 'infinite or undefined'} feature maps at step {step} of trajectory "
                    f"{self.trajectory}, prompts {prompts}; the last checkpoint stands: lower lr ({self.config.lr})"
                )
        for cached in self.cache.values():
            cached.clear()
        if self.folder is not None:
            row = {"trajectory": self.trajectory, "step": step, "update": self.update, "loss": means}
            append_jsonl(self._log, row)
        return sum(means.values()) / len(means)

    def _loss(self, pair: FeatureMapPair, rate: Rate, item: Item, generator: torch.Generator) -> Tensor:
        q, k, _, y = item
        if self.config.loss == "value":
            return value_loss(y, student(self.bank.spec, pair, rate, item, self.grid, self.config.backend))
        rows = torch.randperm(q.shape[1], generator=generator)[: self.config.attention_loss_queries]
        return attention_loss(
            q,
            k,
            pair.phi_q,
            pair.phi_k,
            rate=rate,
            normalizer=self.config.normalizer,
            pattern=self.config.pattern,
            grid=self.grid,
            rows=rows.sort().values.to(q.device),
        )

    def _measure_on(self, prompts: list[str]) -> None:
        """Append the errors of one held-out trajectory."""
        seed = self._seed("heldout", self.measured)
        found = trajectory_errors(
            self.pipe, self.bank, self.blocks, prompts, seed=seed, config=self.config, grid=self.grid
        )
        for key, values in found.items():
            if not all(map(math.isfinite, values)):
                raise DivergenceError(
                    f"the error of block/rate {key} is not finite on the held-out prompts {prompts}; the last "
                    f"checkpoint stands: lower lr ({self.config.lr})"
                )
            self.errors[key] += values

    def _set_lr(self) -> None:
        left = 1 - self.update / self.plan.updates if self.config.lr_schedule == "linear" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * left

    def _seed(self, purpose: str, number: int) -> int:
        return int(digest([self.config.seed, purpose, number])[:12], 16)

    @property
    def _log(self) -> Path:
        assert self.folder is not None
        return self.folder / f"log-{self.index:03d}.jsonl"

    def _save(self) -> None:
        if self.folder is None:
            return
        write_torch(
            checkpoint_path(self.folder, self.index),
            {
                "trajectory": self.trajectory,
                "update": self.update,
                "measured": self.measured,
                "errors": self.errors,
                "maps": {f"{block}/{rate}": pair.state_dict() for (block, rate), pair in self.pairs.items()},
                "optimizer": self.optimizer.state_dict(),
            },
        )

    def _load(self) -> None:
        if self.folder is None or not checkpoint_path(self.folder, self.index).exists():
            return
        path = checkpoint_path(self.folder, self.index)
        saved = read_torch(path, device=self.device)
        try:
            self.trajectory, self.update, self.measured = saved["trajectory"], saved["update"], saved["measured"]
            self.errors = saved["errors"]
            for (block, rate), pair in self.pairs.items():
                pair.load_state_dict(saved["maps"][f"{block}/{rate}"])
            self.optimizer.load_state_dict(saved["optimizer"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is no checkpoint of this run: {error}; delete it to do it again") from error
        if self._log.exists():
            rows = read_jsonl(self._log, keep=lambda row: row["trajectory"] < self.trajectory)
            write_text(self._log, "".join(json.dumps(row) + "\n" for row in rows))
