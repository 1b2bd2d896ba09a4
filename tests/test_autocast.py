"""Under autocast our functions give torch's dtypes, of results and gradients, and refuse what torch refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF

import llmkern.functional as LF

TARGET, INDICES = torch.tensor([1, 2, -100]), torch.tensor([[1, 2, 1], [0, 3, 2]])
CASES: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "cross_entropy": (lambda F, x, _: F.cross_entropy(x, TARGET, reduction="none"), ((3, 4), (1,))),
    "probabilities": (lambda F, x, p: F.cross_entropy(x, p, label_smoothing=0.1), ((3, 4), (3, 4))),
    "nll_loss": (lambda F, x, _: F.nll_loss(x, TARGET), ((3, 4), (1,))),
    "mse_loss": (lambda F, x, y: F.mse_loss(x, y), ((3, 4), (3, 4))),
    "linear": (lambda F, x, w: F.linear(x, w), ((3, 4), (5, 4))),
    "layer_norm": (lambda F, x, w: F.layer_norm(x, (4,), w), ((3, 4), (4,))),
    "rms_norm": (lambda F, x, w: F.rms_norm(x, (4,), w), ((3, 4), (4,))),
    "embedding": (lambda F, w, _: F.embedding(INDICES, w), ((5, 4), (1,))),
    "embedding_bag": (lambda F, w, p: F.embedding_bag(INDICES, w, mode="sum", per_sample_weights=p), ((5, 4), (2, 3))),
    "gru_cell": (
        lambda F, x, w: (F if F is LF else torch._VF).gru_cell(x, x[:, :2], w, w[:, :2], w[:, 0], w[:, 1]),
        ((3, 4), (6, 4)),
    ),
}
if hasattr(TF, "linear_cross_entropy"):
    CASES["linear_cross_entropy"] = (lambda F, x, w: F.linear_cross_entropy(x, w, TARGET), ((3, 4), (5, 4)))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_dtypes_are_torchs(case: str, cast: torch.dtype | None) -> None:
    function, shapes = CASES[case]
    first, second = map(torch.randn, shapes)

    def dtypes(functions: Any, a: torch.dtype, b: torch.dtype) -> Any:
        points = [first.to(a).requires_grad_(), second.to(b).requires_grad_()]
        try:
            with torch.autocast("cpu", dtype=cast, enabled=cast is not None):
                out = function(functions, *points)
            # torch 2.10 has no gradients of a squared error of two dtypes.
            grads = torch.autograd.grad(out.sum(), points, allow_unused=True)
        except (RuntimeError, ValueError) as error:
            return type(error)
        return out.dtype, [None if g is None else g.dtype for g in grads]

    for a in DTYPES:
        for b in DTYPES:
            assert dtypes(LF, a, b) == dtypes(TF, a, b), (a, b)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_float64_losses_keep_their_digits(cast: torch.dtype) -> None:
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randint(7, (5,)), torch.rand(7, dtype=torch.float64)
    with torch.autocast("cpu", dtype=cast):
        got = LF.cross_entropy(x, target, weight, label_smoothing=0.1)
    expected = TF.cross_entropy(x, target, weight, label_smoothing=0.1)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (got, expected)), rtol=1e-13, atol=1e-15)
