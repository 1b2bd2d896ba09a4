"""The numerical rule of the house, as assertions.

Against an fp64 reference, our error is at most twice torch's own error in the same dtype, plus a few rounding steps
of the result's scale. `FLOATS` are the dtypes that every op serves.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from llmkern import dispatch

# Whether this process runs Triton's kernels on the CPU, and nothing else (tests/test_interpreter.py starts it).
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def kernels(op: str) -> list[str]:
    """The kernel backends that serve ``op`` here, for tests marked ``kernels``, which loop over them on CPU tensors."""
    names = ["triton"] if INTERPRETING else ["native"]
    return [name for name in names if name in dispatch.TABLE[op] and dispatch.unavailable(name) is None]


def assert_accurate(
    actual: Tensor, expected: Tensor, torch_result: Tensor | None = None, ulps: float = 4, scale: float = 0
) -> None:
    """`actual` against `expected` (fp64); `torch_result` is torch's own result in `actual`'s dtype.

    NaN and infinities must stand where the reference has them. Without `torch_result` the bound is the rounding term
    alone. `scale`: the size of the terms of a sum whose result may be smaller than they are.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if torch_result is not None:
        assert actual.dtype == torch_result.dtype, f"dtype {actual.dtype}, torch gives {torch_result.dtype}"
    got, want = actual.detach().double().cpu(), expected.detach().double().cpu()
    finite = torch.isfinite(want.to(actual.dtype))
    rounded = want.to(actual.dtype).double()
    assert torch.equal(torch.isnan(got), torch.isnan(want)), "NaN in other places than the reference has it"
    assert torch.equal(got[~finite & ~torch.isnan(want)], rounded[~finite & ~torch.isnan(want)]), "infinities differ"
    got, want = got[finite], want[finite]
    if not got.numel():
        return
    bound = ulps * torch.finfo(actual.dtype).eps * max(scale, float(want.abs().max()))
    if actual.dtype == torch.float64:
        # The reference rounds too: by a few ulps of the numbers on the way, which are of order 1.
        bound += 16 * torch.finfo(torch.float64).eps
    if torch_result is not None:
        own = torch_result.detach().double().cpu()[finite]
        bound += 2 * float((own - want).abs().nan_to_num(0).max())
    error = float((got - want).abs().max())
    assert error <= bound, f"max error {error:.3e} exceeds {bound:.3e} ({actual.dtype})"
