"""Variants made ready to run: inputs and weights on the device, and a call without arguments for each."""

import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from ..layers.feature_map import FeatureMap
from ..models import HybridConfig, convert_, hybrid_processors
from ..ops.hybrid import hybrid_attention
from ..rates import Rate
from .cases import Case
from .kernels import dense_attention, dispatched
from .shapes import Shape
from .variants import Variant

Key = TypeVar("Key")

CACHE_BYTES = 256 * 2**20
"""Inputs in rotation are together larger than this, several times the last cache of any device, or `MAX_SETS`."""
MAX_SETS = 64
TIMESTEP = 500.0


@dataclass(frozen=True)
class Place:
    """Where tensors live, and in what dtype."""

    device: torch.device
    dtype: torch.dtype

    def random(self, *size: int) -> Tensor:
        """Normal random numbers."""
        return torch.randn(*size, device=self.device, dtype=self.dtype)


def make_calls(case: Case, place: Place) -> dict[Variant, Callable[[], object]]:
    """A call for each variant of `case`, on inputs that they share."""
    if case.scope == "op":
        return operator_calls(case.shape, case.variants, case.backward, place)
    model = build_transformer(case.shape, place, blocks=1 if case.scope == "block" else None)
    inputs = transformer_inputs(case.shape, place)
    models = {variant: wear(model, variant, variant.rate) for variant in case.variants}
    if case.scope == "block":
        return block_calls(models, first_block_inputs(model, inputs), case.backward)
    return transformer_calls(models, inputs, case.backward)


# --- the operator --------------------------------------------------------------------------------------------------


def operator(variant: Variant, phi_q: FeatureMap, phi_k: FeatureMap) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`variant` as a function of q, k and v (b n h d)."""
    if variant.dense:
        return dense_attention(variant.kernel)
    softmax_part = dispatched(variant.kernel)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hybrid_attention(
            q, k, v, phi_q, phi_k,
            rate=variant.rate, normalizer=variant.normalizer, pattern=variant.pattern,
            backend=variant.backend, attention_backend=softmax_part,  # type: ignore[arg-type]
        )  # fmt: skip

    return torch.compile(attend, fullgraph=True, dynamic=False) if variant.compiled else attend


def operator_calls(
    shape: Shape, variants: tuple[Variant, ...], backward: bool, place: Place, *, every: int = 1
) -> dict[Variant, Callable[[], object]]:
    """One sample; q, k and v in rotation, so that a short sequence does not stay in the cache.

    With `every`, keys and values are a view of every so-manieth token: the softmax part of a hybrid alone.
    """
    heads, head_dim = shape.spec.heads, shape.spec.head_dim
    size = (1, shape.tokens, heads, head_dim)
    each = 3 * shape.tokens * heads * head_dim * place.dtype.itemsize
    count = min(MAX_SETS, 1 + CACHE_BYTES // each)
    sets = [[place.random(*size).requires_grad_(backward) for _ in range(3)] for _ in range(count)]
    gradient = place.random(*size)

    def ready(variant: Variant) -> Callable[[], object]:
        maps = [FeatureMap(heads, head_dim).to(place.device, place.dtype) for _ in range(2)]
        attend = operator(variant, maps[0], maps[1])
        parameters = [] if variant.dense else [parameter for phi in maps for parameter in phi.parameters()]

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v) if every == 1 else attend(q, k[:, ::every], v[:, ::every])

        def call(inputs: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
            if backward:
                return torch.autograd.grad(forward(*inputs), [*inputs, *parameters], gradient)
            with torch.no_grad():
                return forward(*inputs)

        turns = [functools.partial(call, inputs) for inputs in sets]
        return graphs_of(turns) if variant.graphed else _in_rotation(turns)

    return {variant: ready(variant) for variant in variants}


class WrongGraph(Exception):
    """A CUDA graph computes something else than its kernels do when they are launched one by one."""


def graphs_of(turns: Sequence[Callable[[], Any]]) -> Callable[[], object]:
    """`turns` in rotation, as CUDA graphs that share their memory. All are captured, and checked, by the first call."""

    @functools.cache
    def replays() -> Callable[[], object]:
        pool = torch.cuda.graph_pool_handle()
        return _in_rotation([capture(turn, pool) for turn in turns])

    return lambda: replays()()


def _in_rotation(turns: Sequence[Callable[[], object]]) -> Callable[[], object]:
    each = itertools.cycle(turns)
    return lambda: next(each)()


def capture(call: Callable[[], Tensor | tuple[Tensor, ...]], pool: Any) -> Callable[[], object]:
    """`call`, whose inputs stay where they are, as a CUDA graph with its memory from `pool`.

    WrongGraph if its results are more than four roundings from those of a call without it.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        found = call()
    graph.replay()
    for ours, theirs in zip(_tensors(found), _tensors(expected), strict=True):
        error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        if not error <= 4 * torch.finfo(_tensors(found)[0].dtype).eps:
            raise WrongGraph(f"a CUDA graph's result is {error:.2g} from that of its kernels launched one by one")

    def replay() -> object:
        graph.replay()
        return found

    return replay


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


# --- models --------------------------------------------------------------------------------------------------------


def build_transformer(shape: Shape, place: Place, *, blocks: int | None = None) -> WanTransformer3DModel:
    """A stock Wan transformer with random weights, in the dtypes that diffusers loads one in; `blocks`: fewer."""
    spec = shape.spec
    with place.device:
        model = WanTransformer3DModel(
            patch_size=spec.patch_size,
            num_attention_heads=spec.heads,
            attention_head_dim=spec.head_dim,
            in_channels=shape.channels,
            out_channels=shape.channels,
            text_dim=shape.text_dim,
            ffn_dim=spec.ffn_dim,
            num_layers=blocks or spec.blocks,
            cross_attn_norm=spec.cross_attn_norm,
            qk_norm=spec.qk_norm,
            eps=spec.eps,
        )
    for name, parameter in model.named_parameters():
        if not any(part in model._keep_in_fp32_modules for part in name.split(".")):
            parameter.data = parameter.data.to(place.dtype)
    return model.eval()


def wear(model: WanTransformer3DModel, variant: Variant, rates: Rate | Mapping[int, Rate]) -> WanTransformer3DModel:
    """A copy of `model` on the same weights, with the attention of `variant` in the blocks at `rates`."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    worn = copy.deepcopy(model, shared)
    each: Mapping[int, Rate] = rates if isinstance(rates, Mapping) else {i: rates for i in range(len(model.blocks))}
    converted = dict.fromkeys(each, 2) if variant.dense and not variant.stock else each
    if set(converted.values()) != {1}:
        convert_(worn, HybridConfig(converted, normalizer=variant.normalizer, pattern=variant.pattern))
        for processor in hybrid_processors(worn).values():
            processor.backend, processor.enabled = variant.backend, not variant.dense  # type: ignore[assignment]
    for module in worn.modules():
        if isinstance(module, WanAttention):
            module.processor._attention_backend = dispatched(variant.kernel)  # type: ignore[union-attr]
    if variant.compiled:
        worn.compile_repeated_blocks(fullgraph=True, dynamic=False)
    return worn


def transformer_inputs(shape: Shape, place: Place) -> dict[str, Any]:
    """Arguments of a transformer's forward for one sample."""
    times = (1, shape.tokens) if shape.time_per_token else (1,)
    return {
        "hidden_states": place.random(1, shape.channels, *shape.latent_size()),
        "timestep": torch.full(times, TIMESTEP, device=place.device),
        "encoder_hidden_states": place.random(1, shape.spec.text_tokens, shape.text_dim),
        "return_dict": False,
    }


def transformer_calls(
    models: Mapping[Key, WanTransformer3DModel], inputs: dict[str, Any], backward: bool
) -> dict[Key, Callable[[], object]]:
    """The whole transformer; with `backward`, a training step with gradient checkpointing, without its optimizer."""
    gradient = torch.randn_like(inputs["hidden_states"])

    def ready(model: WanTransformer3DModel) -> Callable[[], object]:
        if not backward:
            return _without_gradients(lambda: model(**inputs))
        model.enable_gradient_checkpointing()
        return _training_step(lambda: model(**inputs)[0], gradient, list(model.parameters()))

    return {key: ready(model) for key, model in models.items()}


def block_calls(
    models: Mapping[Key, WanTransformer3DModel], inputs: tuple[Any, ...], backward: bool
) -> dict[Key, Callable[[], object]]:
    """The first block alone; with `backward`, the gradients of hidden states, context, time and weights too."""
    hidden_states, context, time, rotary = inputs
    leaves = [tensor.requires_grad_(backward) for tensor in (hidden_states, context, time)]
    gradient = torch.randn_like(hidden_states)

    def ready(block: nn.Module) -> Callable[[], object]:
        if not backward:
            return _without_gradients(lambda: block(*leaves, rotary))
        return _training_step(lambda: block(*leaves, rotary), gradient, [*leaves, *block.parameters()])

    return {key: ready(model.blocks[0]) for key, model in models.items()}


@torch.no_grad()
def first_block_inputs(model: WanTransformer3DModel, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """What `model` hands its first block: hidden states, context, time and rotary embeddings."""
    handed: list[tuple[Any, ...]] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, arguments: handed.append(arguments))
    model(**inputs)
    hook.remove()
    return handed[0]


def _without_gradients(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def _training_step(forward: Callable[[], Tensor], gradient: Tensor, leaves: list[Tensor]) -> Callable[[], object]:
    def step() -> None:
        forward().backward(gradient)
        for leaf in leaves:
            leaf.grad = None

    return step
