"""Compiles, for a GPU that need not be there, exactly what the launches of `ops.triton` would compile on it."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as SpecializedDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from attention_surgery.ops.triton import backward, forward, plan
from attention_surgery.ops.triton.hopper import launch
from attention_surgery.ops.triton.plan import Map, Rotary

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Compiled:
    """Resources of one kernel: spilled bytes of stack, shared memory; layouts (TTGIR), PTX and machine code (SASS)."""

    name: str
    registers: int
    stack: int
    shared: int
    ttgir: str
    ptx: str
    sass: str

    @property
    def code(self) -> int:
        """Bytes of machine code: where the last instruction of 16 bytes ends."""
        return int(re.findall(r"^\s+/\*([0-9a-f]{4,})\*/", self.sass, re.M)[-1], 16) + 16


class _Recorder:
    """Stands in for a kernel: compiles it for the arguments it is launched with, or notes what would be compiled."""

    def __init__(self, kernel: triton.JITFunction, arch: int, results: list[Compiled] | None, kinds: set[str]) -> None:
        self.kernel, self.arch, self.results, self.kinds = kernel, arch, results, kinds

    def __getitem__(self, grid: tuple[int, ...]) -> "_Recorder":
        return self

    def __call__(
        self, *, num_warps: int = 4, num_stages: int = 1, maxnreg: int | None = None, **arguments: object
    ) -> None:
        signature, constants, attributes = {}, {}, {}
        for position, parameter in enumerate(self.kernel.params):
            value = arguments.pop(parameter.name)
            number = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (number and value == 1):
                signature[parameter.name], constants[(position,)] = "constexpr", value
                continue
            signature[parameter.name] = _type(value)
            if isinstance(value, torch.Tensor) or (number and value % 16 == 0):
                attributes[(position,)] = [["tt.divisibility", 16]]
        assert not arguments, f"{self.kernel.__name__} has no parameters {sorted(arguments)}"
        self.kinds.add(f"{self.kernel.__name__} {signature} {constants} {sorted(attributes)}")
        if self.results is None:
            return
        source = GluonASTSource if self.kernel.is_gluon() else ASTSource
        compiled = triton.compile(
            source(self.kernel, signature, constants, attributes),
            target=GPUTarget("cuda", self.arch, 32),
            options={"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg},
        )
        cubin, shared = compiled.asm["cubin"], compiled.metadata.shared
        registers, stack = _resources(cubin)
        sass = _inspect(cubin, "--dump-sass")
        text = (compiled.asm[stage] for stage in ("ttgir", "ptx"))
        self.results.append(Compiled(self.kernel.__name__, registers, stack, shared, *text, sass))


def _type(value: object) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
    if isinstance(value, SpecializedDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    assert isinstance(value, float), value
    return "fp32"


def _inspect(cubin: bytes, option: str) -> str:
    """What NVIDIA's cuobjdump, which Triton brings, says of a binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, which these kernels use for nothing but spills."""
    text = _inspect(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])


def idle_warps(ttgir: str) -> list[str]:
    """Products of Hopper's matrix unit that are spread over more warps than the result has rows for (16 each).

    The warps beyond repeat the rows. Triton 3.6 then gives wrong results, or reads memory that is not there, where such
    a layout is converted to another: seen with float32 operands, whose three products get layouts of their own.
    """
    layout = r"^(#mma\d*) = #ttg\.nvidia_mma<\{versionMajor = 3.*?warpsPerCTA = \[(\d+)"
    warps = {name: int(count) for name, count in re.findall(layout, ttgir, re.M)}
    results = re.findall(r"ttng\.warp_group_dot .*-> (tensor<(\d+)x\d+x\w+, (#mma\d*)>)", ttgir)
    return [result for result, rows, name in results if 16 * warps[name] > int(rows)]


def touched_in_flight(sass: str) -> list[str]:
    """Instructions of sm_90 that touch registers of a matrix product that may still be under way.

    A product (HGMMA) reads a left operand that is in registers, and writes its accumulator, until a DEPBAR waits for
    it: nothing else may write the former or name the latter. The code is walked as it stands, and every loop twice, so
    that the end of one pass meets the beginning of the next.
    """
    code = [(int(address, 16), text.strip()) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+);", sass)]
    place = {address: index for index, (address, _) in enumerate(code)}
    walks = [code]
    for index, (_, text) in enumerate(code):
        jump = re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", text)
        if jump and place.get(int(jump[1], 16), len(code)) < index:
            walks.append(2 * code[place[int(jump[1], 16)] : index + 1])
    faults = {}
    for walk in walks:
        groups: list[tuple[set[int], set[int]]] = []  # operands and accumulators of each group of products
        operands: set[int] = set()
        accumulators: set[int] = set()
        for address, text in walk:
            text = re.sub(r"^@!?U?P\w+ +", "", text)
            wait = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)", text)
            if text.startswith("HGMMA"):
                product = re.match(r"HGMMA\.64x(\d+)x\S* R(\d+), (?:R(\d+),)?", text)
                assert product, text
                accumulators |= _from(int(product[2]), int(product[1]) // 2)
                operands |= _from(int(product[3]), 4) if product[3] else set()
                if "gsb0" in text:
                    groups, operands, accumulators = [*groups, (operands, accumulators)], set(), set()
            elif wait:
                groups = groups[len(groups) - int(wait[1], 16) :] if int(wait[1], 16) else []
            else:
                busy = operands.union(*(group[0] for group in groups))
                growing = accumulators.union(*(group[1] for group in groups))
                if _written(text) & (busy | growing) or _named(text) & growing:
                    faults[address] = f"{address:#x} {text}"
    return list(faults.values())


def _from(first: int, count: int) -> set[int]:
    return set(range(first, first + count))


def _written(text: str) -> set[int]:
    """Registers that an instruction writes, other than those of a matrix product."""
    found = re.match(r"([A-Z0-9_.]+) R(\d+)\b", text)
    if not found or found[1].startswith(("ST", "RED", "ATOM", "SYNCS")):
        return set()
    four, two = re.search(r"\.128\b|\.M88\.4\b", found[1]), re.search(r"\.64\b|\.WIDE\b|\.M88\.2\b", found[1])
    return _from(int(found[2]), 4 if four else 2 if two else 1)


def _named(text: str) -> set[int]:
    """Registers that an instruction names, each by itself."""
    return {int(number) for number in re.findall(r"\bR(\d+)\b", text)}


@contextmanager
def recorded(arch: int, results: list[Compiled] | None) -> Iterator[set[str]]:
    """Within, launches of `forward` and `backward` compile for sm_`arch` into `results`, if given, instead of running.

    Yields what Triton tells one compilation from another by.
    """
    kinds: set[str] = set()
    with ExitStack() as stack:
        stack.enter_context(patch.object(plan, "_hardware", lambda _: (arch, 132)))
        for module in (forward, backward, plan, launch):
            for name, value in vars(module).copy().items():
                if isinstance(value, triton.JITFunction):
                    stack.enter_context(patch.object(module, name, _Recorder(value, arch, results, kinds)))
        yield kinds


def compile_all(
    arch: int, head_dim: int, *, degree: int = 2, dtype: torch.dtype = torch.bfloat16, table: bool = False
) -> list[Compiled]:
    """Every kernel at its block sizes for this architecture, both sides of the gradients, with and without weights."""
    results: list[Compiled] = []
    with recorded(arch, results):
        launch_all(head_dim, degree=degree, dtype=dtype, table=table)
    return results


def launch_all(
    head_dim: int,
    *,
    n: int = 4096,
    h: int = 2,
    degree: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    table: bool = False,
) -> None:
    """Call everything that launches a kernel once, at rate 4."""
    b, rate, features = 1, 4, degree * head_dim
    q, k, v = (torch.empty(b, n, h, head_dim, dtype=dtype) for _ in range(3))
    phi = Map(
        torch.empty(h, head_dim, features), torch.empty(h, features),
        torch.empty(h, features, features), torch.empty(h, features),
    )  # fmt: skip
    state, mass = torch.empty(b, h, features, head_dim), torch.empty(b, h, features)
    rows = torch.empty(b, h, n)
    positions = torch.empty(h, -(-n // rate), dtype=torch.int64) if table else None
    forward.linear_state(k, v, phi, positions, rate)
    forward.merge(q, q, state, mass, phi, 0.1)
    forward.merge(q, q, state, mass, phi, 0.1, rows)
    forward.attend(q, k[:, ::rate], v[:, ::rate])
    for weights in (True, False):
        backward.state_gradients(state, mass, (k[:, ::rate], v[:, ::rate]), k, v, phi, positions, rate, weights)
        for added in (None, q):
            backward.merge_gradients(q, rows, added, q, state, mass, phi, 0.1, weights)
    launch_rotary(1536, head_dim, n=n, dtype=dtype)  # a kernel for each width of model
    backward.output_gradients(q, q, rows)
    backward.attend_gradients(q, k[:, ::rate], v[:, ::rate], q, rows, rows, q)


def launch_rotary(channels: int, head_dim: int, *, n: int = 4096, dtype: torch.dtype = torch.bfloat16) -> None:
    """QK-norm and rotation, and their gradients, of tokens of so many channels."""
    q, k, weight_q, weight_k = (torch.empty(*size, channels, dtype=dtype) for size in ((1, n), (1, n), (), ()))
    rotary = Rotary(q, k, weight_q, weight_k, torch.empty(n, head_dim), torch.empty(n, head_dim), 1e-6, 1e-6)
    forward.rotary(rotary)
    forward.rotary_of_k(k, weight_k, rotary.cos, rotary.sin, 1e-6)
    grad = q.unflatten(2, (-1, head_dim))
    backward.rotary_gradients(grad, grad, rotary)
