"""What fits in memory: which blocks are trained in one pass over the teacher, and how many steps are cached."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from ..rates import Rate
from .config import DistillConfig

BYTES_PER_TRAINED_PARAMETER = 16  # float32 value and gradient, and AdamW's two moments
ACTIVATIONS_PER_FEATURE = 8  # float32 tensors of n·h·f that one update of one pair of maps holds, upper bound
MIN_WINDOW = 2  # cached forwards below which more passes are preferred to a smaller cache


@dataclass(frozen=True)
class DistillPlan:
    """The passes over the teacher trajectories, and what they hold in memory.

    Attributes:
        passes: the blocks of each pass; every pass samples all trajectories again.
        window: transformer forwards whose activations are cached at once, before U rounds of updates on them.
        teacher_forwards: transformer forwards over all passes, held-out trajectories included.
        updates: optimizer steps of each block.
        state_bytes, cache_bytes, work_bytes: at the peak, for parameters and optimizer, cached activations, one update.
        disk_bytes: of the checkpoint and the finished bank.
    """

    passes: tuple[tuple[int, ...], ...]
    window: int
    teacher_forwards: int
    updates: int
    state_bytes: int
    cache_bytes: int
    work_bytes: int
    disk_bytes: int

    @property
    def memory_bytes(self) -> int:
        """All that is held beside the pipeline, at the peak."""
        return self.state_bytes + self.cache_bytes + self.work_bytes

    def __str__(self) -> str:
        gib = 2**30
        return (
            f"{len(self.passes)} pass(es) of up to {len(self.passes[0])} blocks, "
            f"{self.window} forwards cached at once, {self.updates} updates per block, "
            f"{self.teacher_forwards} teacher forwards; memory {self.memory_bytes / gib:.2f} GiB beside the pipeline "
            f"({self.state_bytes / gib:.2f} parameters and optimizer, {self.cache_bytes / gib:.2f} activations, "
            f"{self.work_bytes / gib:.2f} work), disk {self.disk_bytes / gib:.2f} GiB"
        )


def plan_distillation(
    blocks: Sequence[int],
    rates: Sequence[Rate],
    config: DistillConfig,
    *,
    tokens: int,
    heads: int,
    head_dim: int,
    element_size: int,
    world_size: int = 1,
) -> DistillPlan:
    """Fit the distillation of `blocks` at `rates` into `config.memory_gib`.

    Args:
        tokens: video tokens per sample; heads, head_dim: of the self-attention.
        element_size: bytes per activation, as the transformer computes them.
        world_size: processes that share the passes; at least as many passes are made, where there are enough blocks.

    Raises:
        ConfigError: one block does not fit; the message says how much memory would do.
    """
    features = config.degree * head_dim
    map_parameters = heads * (head_dim * features + features)
    map_parameters += heads * (config.layers - 1) * (features * features + features)
    state = 2 * map_parameters * len(rates) * BYTES_PER_TRAINED_PARAMETER
    item = 4 * config.batch_size * tokens * heads * head_dim * element_size
    work = ACTIVATIONS_PER_FEATURE * config.batch_size * tokens * heads * features * 4
    if config.loss == "attention":
        work += 4 * config.batch_size * heads * min(config.attention_loss_queries, tokens) * tokens * 4
    budget = int(config.memory_gib * 2**30)
    per_trajectory = config.num_inference_steps * config.forwards_per_step
    least = work + state + item
    if least > budget:
        raise ConfigError(
            f"distilling one block needs {least / 2**30:.2f} GiB; memory_gib is {config.memory_gib}: raise it"
        )
    wanted = min(MIN_WINDOW, per_trajectory)
    at_once = max(1, min(len(blocks), (budget - work) // (state + wanted * item), -(-len(blocks) // world_size)))
    count = -(-len(blocks) // at_once)
    passes = tuple(tuple(blocks[i::count]) for i in range(count))
    widest = len(passes[0])
    window = max(1, min(per_trajectory, (budget - work - widest * state) // (widest * item)))
    heldout = -(-config.heldout_prompts // config.batch_size)
    return DistillPlan(
        passes=passes,
        window=window,
        teacher_forwards=count * per_trajectory * (config.num_trajectories + heldout),
        updates=config.num_trajectories * per_trajectory * config.updates_per_batch,
        state_bytes=widest * state,
        cache_bytes=window * widest * item,
        work_bytes=work,
        disk_bytes=len(blocks) * state,
    )
