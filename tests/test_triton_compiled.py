"""Ahead-of-time compilation at the block sizes in use: spills, shared memory, Hopper's matrix unit, races."""

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from ahead_of_time import (  # noqa: E402
    SHARED_MEMORY,
    Compiled,
    compile_all,
    idle_warps,
    launch_all,
    launch_rotary,
    recorded,
    touched_in_flight,
)

from attention_surgery.layers.projections import MAX_CHANNELS  # noqa: E402
from attention_surgery.ops.triton import plan  # noqa: E402
from attention_surgery.ops.triton.hopper import launch  # noqa: E402

TAKEN_WITH = plan.SPECIALIZED
KERNELS = {
    "state_kernel", "merge_kernel", "attend_kernel", "output_gradient_kernel", "map_gradient_kernel",
    "value_gradient_kernel", "softmax_tokens_kernel", "token_product_kernel", "sum_products_kernel",
    "query_gradient_kernel", "key_gradient_kernel", "prepare_kernel", "sum_states_kernel", "rotary_kernel",
    "rotary_gradient_kernel",
}  # fmt: skip

WITHOUT_PRODUCTS = {
    "output_gradient_kernel", "softmax_tokens_kernel", "sum_products_kernel", "prepare_kernel", "sum_states_kernel",
    "rotary_kernel", "rotary_gradient_kernel",
}  # fmt: skip

RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])

SPECIALIZED = {
    "specialized_merge_kernel": 168, "specialized_state_kernel": 96, "specialized_map_gradient_kernel": 120,
    "specialized_product_kernel": 0,
}  # fmt: skip
"""Bytes of stack allowed with releases that they are not taken with: what they spill with Triton 3.9. None is allowed
with those that they are taken with."""

CODE = 104 * 1024
"""Bytes of machine code allowed in a specialized kernel: 216 KB took an H200 most of twice the time (docs/log.md)."""


@pytest.fixture
def general(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel is the general one, whatever Triton's release."""
    monkeypatch.setattr(plan, "SPECIALIZED", ())


@pytest.fixture
def specialized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Specialized kernels are taken with the release at hand too."""
    monkeypatch.setattr(plan, "SPECIALIZED", (RELEASE,))


@pytest.mark.usefixtures("general")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", [80, 89, 90])
def test_tuned_blocks_compile_without_spills(arch: int, head_dim: int) -> None:
    compiled = compile_all(arch, head_dim)
    assert {kernel.name for kernel in compiled} == KERNELS
    for kernel in compiled:
        spilled = f"{kernel.name} spills {kernel.stack} bytes ({kernel.registers} registers)"
        assert kernel.stack == 0, spilled
        assert kernel.shared <= SHARED_MEMORY[arch], f"{kernel.name} needs {kernel.shared} bytes of shared memory"
        if arch == 90 and kernel.name not in WITHOUT_PRODUCTS:
            assert "wgmma.mma_async" in kernel.ptx, f"{kernel.name} does not use the warp-group matrix unit"
        assert not idle_warps(kernel.ttgir), kernel.name
        faults = touched_in_flight(kernel.sass)
        assert not faults, f"{kernel.name} touches registers in flight: {faults}"


@pytest.mark.usefixtures("specialized")
@pytest.mark.parametrize(("dtype", "table"), [(torch.bfloat16, False), (torch.float16, True)])
def test_specialized_kernels_compile_without_spills(dtype: torch.dtype, table: bool) -> None:
    """With the releases that they are taken with; with others no more than they do."""
    kernels = [each for each in compile_all(90, 128, dtype=dtype, table=table) if each.name in SPECIALIZED]
    assert {kernel.name for kernel in kernels} == set(SPECIALIZED)
    for kernel in kernels:
        allowed = 0 if RELEASE in TAKEN_WITH else SPECIALIZED[kernel.name]
        assert kernel.stack <= allowed, f"{kernel.name} spills {kernel.stack} bytes"
        assert kernel.code <= CODE, f"{kernel.name} has {kernel.code} bytes of code"
        assert kernel.shared <= SHARED_MEMORY[90], f"{kernel.name} needs {kernel.shared} bytes of shared memory"
        assert "wgmma.mma_async" in kernel.ptx, f"{kernel.name} does not use the warp-group matrix unit"
        faults = touched_in_flight(kernel.sass)
        assert not faults, f"{kernel.name} touches registers in flight: {faults}"


@pytest.mark.parametrize("channels", [1536, 3072, 5120, MAX_CHANNELS])
@pytest.mark.parametrize(("arch", "dtype"), [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32)])
def test_norm_and_rotation_compile_without_spills(arch: int, dtype: torch.dtype, channels: int) -> None:
    """At the widths of Wan's models and at the most that is taken; whole vectors are loaded."""
    results: list[Compiled] = []
    with recorded(arch, results):
        launch_rotary(channels, 128, dtype=dtype)
    assert [kernel.name for kernel in results] == ["rotary_kernel", "rotary_kernel", "rotary_gradient_kernel"]
    for kernel in results:
        assert kernel.stack == 0, f"{kernel.name} spills {kernel.stack} bytes"
        loads = kernel.ptx.count("ld.global")
        assert loads and loads == kernel.ptx.count("ld.global.v4"), f"{kernel.name} loads in pieces"


@pytest.mark.usefixtures("specialized")
def test_more_heads_than_32_bit_offsets_reach_are_left_to_the_general_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_hardware", lambda _: (90, 132))
    most = plan.SPECIALIZED_HEADS
    heads = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16).expand(most + 1, -1, -1, -1)
    assert not plan.Plan(heads, 2).specialized and plan.Plan(heads[1:], 2).specialized
    for few in (1, 12, 40, 100, most):  # what the shares of the state come to, at their most
        shares = launch.split_units(2**20, few, 2, 132)[2]
        assert shares * few * 256 * 128 < 2**31


@pytest.mark.usefixtures("general")
@pytest.mark.parametrize(
    ("arch", "head_dim", "degree", "dtype", "table"),
    [
        (90, 128, 3, torch.bfloat16, False),
        (90, 128, 2, torch.float16, True),
        (90, 64, 2, torch.float32, False),
        (89, 128, 3, torch.float32, True),
        (80, 32, 1, torch.float16, False),
    ],
)
def test_other_arguments_fit_the_device(arch: int, head_dim: int, degree: int, dtype: torch.dtype, table: bool) -> None:
    for kernel in compile_all(arch, head_dim, degree=degree, dtype=dtype, table=table):
        assert kernel.shared <= SHARED_MEMORY[arch], f"{kernel.name} needs {kernel.shared} bytes of shared memory"
        assert not idle_warps(kernel.ttgir), kernel.name
        assert not touched_in_flight(kernel.sass), kernel.name


@pytest.mark.parametrize("kind", ["general", "specialized"])
def test_one_compilation_serves_every_length_and_any_number_of_heads(kind: str, request) -> None:
    """A new resolution waits for no compiler."""
    request.getfixturevalue(kind)
    for arch, table in ((90, False), (90, True), (80, False)):
        found = []
        for n, h in ((4096, 2), (4090, 3), (1000, 16), (70, 1)):
            with recorded(arch, None) as kinds:
                launch_all(128, n=n, h=h, table=table)
            found.append(kinds)
        assert found[0] == found[1] == found[2] == found[3]


def test_an_operand_touched_in_flight_is_found() -> None:
    """A loop that makes the next operand before it waits for the product of the last one, and one that waits first."""
    product = "/*{:04x}*/ HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8].tnspB, R24, gsb0 ;"
    operand = "/*{:04x}*/ F2FP.BF16.F32.PACK_AB R91, R12, R13 ;"
    wait, again = "/*{:04x}*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "/*{:04x}*/ @P0 BRA 0x10 ;"

    def code(*lines: str) -> str:
        return "\n".join(line.format(16 * (i + 1)) for i, line in enumerate(lines))

    assert touched_in_flight(code(operand, wait, product, again)) == ["0x10 F2FP.BF16.F32.PACK_AB R91, R12, R13"]
    assert touched_in_flight(code(wait, operand, product, again)) == []
    assert touched_in_flight(code(product, operand, wait)) == ["0x20 F2FP.BF16.F32.PACK_AB R91, R12, R13"]

    early = "/*{:04x}*/ FMUL R3, R87, R2 ;"  # reads an accumulator
    assert touched_in_flight(code(product, early, wait)) == ["0x20 FMUL R3, R87, R2"]
    assert touched_in_flight(code(product, wait, early)) == []


def test_warps_without_rows_of_their_own_are_found() -> None:
    layouts = "".join(
        f"#mma{i} = #ttg.nvidia_mma<{{versionMajor = {version}, versionMinor = 0, warpsPerCTA = [{warps}]}}>\n"
        for i, (version, warps) in enumerate([(3, "8, 1"), (3, "4, 2"), (2, "8, 1")])
    )
    product = "%u = ttng.warp_group_dot %a, %b, %c : tensor<64x16xf32> * !ttg.memdesc<16x64xf32> -> {} loc(#loc)\n"
    found = ["tensor<64x64xf32, #mma0>", "tensor<128x64xf32, #mma0>", "tensor<64x64xf32, #mma1>"]
    assert idle_warps(layouts + "".join(map(product.format, found))) == found[:1]
