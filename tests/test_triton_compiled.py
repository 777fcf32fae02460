"""Ahead-of-time compilation at the block sizes in use: no spills, room in shared memory, Hopper's matrix unit."""

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from ahead_of_time import SHARED_MEMORY, compile_all  # noqa: E402

KERNELS = {
    "state_kernel", "merge_kernel", "attend_kernel", "feature_gradient_kernel", "input_gradient_kernel",
    "token_product_kernel", "query_gradient_kernel", "key_gradient_kernel",
}  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", [80, 89, 90])
def test_tuned_blocks_compile_without_spills(arch: int, head_dim: int) -> None:
    compiled = compile_all(arch, head_dim)
    assert {kernel.name for kernel in compiled} == KERNELS
    for kernel in compiled:
        assert kernel.stack == 0, f"{kernel.name} spills {kernel.stack} bytes ({kernel.registers} registers)"
        assert kernel.shared <= SHARED_MEMORY[arch], f"{kernel.name} needs {kernel.shared} bytes of shared memory"
        if arch == 90:
            assert "wgmma.mma_async" in kernel.ptx, f"{kernel.name} does not use the warp-group matrix unit"


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
