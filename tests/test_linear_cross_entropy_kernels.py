"""Triton's linear + cross-entropy: chunks of rows and blocks of columns, which of them, and the memory they take."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from checks import INTERPRETING
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from llmkern import dispatch, reference
from llmkern._groups import LossOptions

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif("Triton" in (dispatch.unavailable("triton") or ""), reason="no Triton"),
]
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs kernels on the CPU")
PLAIN = LossOptions()
EVERY = LossOptions(-100, 0.1, 0.1, 3.0, -0.7)
META = torch.device("meta")


@pytest.fixture
def module() -> Any:
    return importlib.import_module("llmkern.kernels.linear_cross_entropy")


@pytest.mark.parametrize(
    ("N", "V", "workspace", "expected"),
    [
        (8192, 128256, 64 << 20, (False, 4096)),  # 261 rows would fit
        (8192, 128256, 1 << 30, (True, 4096)),  # not 4186, 4006: multiples of 128, as even as they come
        (8192, 128256, 2 * 1024 * 128256, (True, 1024)),
        (8192, 128256, 2 * 1024 * 128256 - 1, (False, 14336)),
        (200, 128256, 64 << 20, (True, 200)),
        (8192, 32000, 64 << 20, (True, 1024)),
        (1 << 20, 128256, 64 << 20, (True, 256)),  # blocks would have 32 columns
        (9, 97, 4 * 97 * 2, (False, 33)),
        (29, 13, 4 * 13 * 2, (True, 4)),
        (5, 7, 1, (True, 1)),
    ],
)
def test_plan(module: Any, N: int, V: int, workspace: int, expected: tuple[bool, int]) -> None:
    by_rows, size = module.plan(N, V, 2, workspace)
    assert (by_rows, size) == expected
    assert 2 * size * (V if by_rows else N) <= max(workspace, 2 * max(V, N))


def problem(
    N: int, H: int, V: int, dtype: torch.dtype, soft: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, linear_weight, linear_bias, target and class weights."""
    x, w, b = torch.randn(N, H).to(dtype), (torch.randn(V, H) / H**0.5).to(dtype), torch.randn(V).to(dtype)
    target = torch.randn(N, V).softmax(1).to(dtype) if soft else torch.randint(V, (N,))
    if not soft:
        target[N // 2] = -100
    return x, w, b, target, (0.5 + torch.rand(V)).to(dtype)


# Several chunks of 4 rows, and several blocks of 33 columns; the last of each is shorter.
@interpreted
@pytest.mark.parametrize("shape", [(29, 13, 4 * 13), (9, 97, 4 * 97)], ids=["chunks", "blocks"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", [PLAIN, EVERY], ids=str)
def test_every_output_and_gradient(module: Any, options: Any, soft: bool, shape: tuple[int, int, int]) -> None:
    N, V, workspace = shape[0], shape[1], 8 * shape[2]
    x, w, b, target, weight = problem(N, 5, V, torch.float64, soft)
    cotangents = [torch.randn(N, dtype=torch.float64) for _ in range(3)]
    leaves = [t.clone().requires_grad_() for t in (x, w, b, target) if t.is_floating_point()]
    want = reference.linear_cross_entropy(*leaves[:3], leaves[3] if soft else target, weight, options)
    dwant = torch.autograd.grad(want[:3], leaves, cotangents, retain_graph=True)
    outputs = module.linear_cross_entropy_forward(
        x, w, b, target, weight, None, options, workspace, True, True, False, False, False, False
    )
    assert all(t.numel() == 0 for t in outputs[4:])
    gradients = module.linear_cross_entropy_backward(
        *cotangents, x, w, b, target, weight, options, workspace, True, True, True, soft
    )
    for a, e in zip([*outputs[:4], *gradients[: 3 + soft]], [*want, *dwant], strict=True):
        torch.testing.assert_close(a, e)
    # The gradient of the loss, made in the forward; without those that are not needed.
    both = module.linear_cross_entropy_forward(
        x, w, b, target, weight, cotangents[0], options, workspace, False, False, True, True, True, soft
    )
    of_loss = torch.autograd.grad(want[0], leaves, cotangents[0])
    for a, e in zip([both[0], both[1], *both[4 : 7 + soft]], [want[0], want[1], *of_loss], strict=True):
        torch.testing.assert_close(a, e)
    for i in range(3):
        need = [i == j for j in range(4)]
        one = module.linear_cross_entropy_forward(
            x, w, b, target, weight, cotangents[0], options, workspace, False, False, *need
        )
        assert [t.numel() > 0 for t in one[4:]] == need
        assert torch.equal(one[4 + i], both[4 + i])


@interpreted
@pytest.mark.parametrize("workspace", [2 * 5 * 4, 1 << 20])
def test_sums_over_many_chunks_are_not_rounded(module: Any, workspace: int) -> None:
    """bf16 sums of 128 chunks would stop growing: each term is 1/128 of the sum."""
    N, V = 512, 5
    x, w = torch.ones(N, 3, dtype=torch.bfloat16), torch.zeros(V, 3, dtype=torch.bfloat16)
    b, target = torch.zeros(V, dtype=torch.bfloat16), torch.zeros(N, dtype=torch.int64)
    results = module.linear_cross_entropy_forward(
        x, w, b, target, None, torch.ones(N), PLAIN, workspace, False, False, False, True, True, False
    )
    share = torch.tensor(1 / V).bfloat16().double()
    for gradient in results[5:7]:
        torch.testing.assert_close(gradient[1:].double(), N * share.expand(gradient[1:].shape), rtol=2**-8, atol=0)


@interpreted
def test_an_empty_batch(module: Any) -> None:
    x, w, b, target = torch.empty(0, 3), torch.randn(5, 3), torch.randn(5), torch.empty(0, dtype=torch.int64)
    results = module.linear_cross_entropy_forward(
        x, w, b, target, None, torch.empty(0), PLAIN, 1 << 20, True, True, True, True, True, False
    )
    assert [tuple(t.shape) for t in results] == [(0,)] * 4 + [(0, 3), (5, 3), (5,), (0,)]
    assert not results[5].any()
    assert not results[6].any()


class _Peak(TorchDispatchMode):
    """The most bytes that storages take at one time, of those that operations inside make."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = dict[StorageWeakRef, int](), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)]
        known = {StorageWeakRef(t.untyped_storage()) for t in given}
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and (ref := StorageWeakRef(t.untyped_storage())) not in known:
                self.alive[ref] = t.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def peak(module: Any, workspace: int, gradient: bool = True) -> int:
    """Of the step of a language model of 128,256 words, without its operands."""
    from llmkern.kernels import _launch

    N, H, V = 8192, 4096, 128256
    x, w = (torch.empty(n, H, dtype=torch.bfloat16, device=META) for n in (N, V))
    target, dloss = torch.empty(N, dtype=torch.int64, device=META), torch.empty(N, device=META)
    with _launch.recording(), _Peak() as memory:
        module.linear_cross_entropy_forward(
            x, w, None, target, None, dloss if gradient else None, PLAIN, workspace, False, False, gradient, gradient,
            False, False,
        )  # fmt: skip
    return memory.peak


def test_memory(module: Any) -> None:
    """Counted from shapes: the results, a workspace, and what is summed in fp32."""
    N, H, V, some = 8192, 4096, 128256, 8 << 20
    gradients = 2 * (V * H + N * H)
    blocks = gradients + 2 * N * 4096 + 4 * N * H
    assert blocks <= peak(module, 64 << 20) <= blocks + some <= 1.35 * 2**30
    chunks = gradients + 2 * 4096 * V + 4 * V * H
    assert chunks <= peak(module, 1 << 30) <= chunks + some
    whole = gradients + 2 * N * V
    assert whole <= peak(module, 2 << 30) <= whole + some
    assert peak(module, 64 << 20, gradient=False) <= (64 << 20) + some
