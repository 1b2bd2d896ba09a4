"""A tensor's values count, not how it lies in memory: every layout of one argument with every layout of the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as TF
from checks import kernels
from torch import Tensor

import llmkern
import llmkern.functional as F
from llmkern import optim

SHAPES = [(4,), (5, 4), (5, 4, 3), (1, 4, 3), (5, 4, 1), (5, 1, 3), (2, 4, 3, 2), (2, 3, 2, 2, 2)]


def layouts(t: Tensor) -> Iterator[Tensor]:
    """The same values: contiguous, sliced, strided, classes last, batch last, dimensions reversed, channels last."""
    yield t
    if t.dim() == 0:
        return
    yield torch.cat([t, t], -1)[..., : t.shape[-1]]
    yield torch.stack([t, t], -1).flatten(-2)[..., ::2]
    if t.dim() > 1:
        backwards = list(range(t.dim()))[::-1]
        yield t.movedim(1, -1).contiguous().movedim(-1, 1)
        yield t.movedim(0, -1).contiguous().movedim(-1, 0)
        yield t.permute(backwards).contiguous().permute(backwards)
    if t.dim() == 4:
        yield t.contiguous(memory_format=torch.channels_last)
    if t.dim() == 5:
        yield t.contiguous(memory_format=torch.channels_last_3d)


def leaf(t: Tensor) -> Tensor:
    """A leaf in the same layout."""
    return t.detach().requires_grad_() if t.is_floating_point() else t


def compare(x: Tensor, target: Tensor, reduction: str, **options: object) -> None:
    """Losses and gradients to both against torch's."""
    results = []
    for function in (F.cross_entropy, TF.cross_entropy):
        points = [leaf(x), leaf(target)]
        loss = function(*points, reduction=reduction, **options)
        rows = loss * torch.arange(1.0, loss.numel() + 1).view(loss.shape)
        results.append([loss, *torch.autograd.grad(rows.sum(), [p for p in points if p.requires_grad])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_targets_may_lie_each_in_their_own_way(shape: tuple[int, ...]) -> None:
    classes, outer = (shape[0], ()) if len(shape) == 1 else (shape[1], (shape[0], *shape[2:]))
    logits, weight = torch.randn(shape, dtype=torch.float64), torch.rand(classes, dtype=torch.float64)
    probabilities = torch.randn(shape, dtype=torch.float64).softmax(0 if len(shape) == 1 else 1)
    targets = [*layouts(probabilities), probabilities[:1].expand(shape), *layouts(torch.randint(classes, outer))]
    for x in layouts(logits):
        for i, target in enumerate(targets):
            # Each reduction and option meets each layout; not all of them each pair.
            options = {"weight": weight if i % 2 else None, "label_smoothing": 0.1 * (i % 4 == 1)}
            compare(x, target, ("none", "mean", "sum")[i % 3], **options)


@pytest.mark.kernels
def test_kernels_read_probabilities_as_they_read_their_logits() -> None:
    logits = torch.randn(5, 4, 3, dtype=torch.float64)
    target = torch.randn(5, 3, 4, dtype=torch.float64).softmax(-1).permute(0, 2, 1)
    for name in kernels("cross_entropy"):
        with llmkern.backend(name):
            compare(logits, target, "none")
            compare(logits.movedim(1, -1).contiguous().movedim(-1, 1), target.contiguous(), "mean")
            compare(logits[:1], target[:1], "sum")


def test_outputs_and_token_weights_follow_the_rows() -> None:
    logits = torch.randn(5, 4, 3, dtype=torch.float64)
    target = torch.randn(5, 3, 4, dtype=torch.float64).softmax(-1).permute(0, 2, 1)
    factors = torch.rand(3, 5, dtype=torch.float64).T
    wanted = F.cross_entropy(
        logits, target.contiguous(), reduction="none", token_weight=factors.contiguous(), outputs=("lse", "argmax")
    )
    for x in layouts(logits):
        got = F.cross_entropy(x, target, reduction="none", token_weight=factors, outputs=("lse", "argmax"))
        for ours, theirs in zip(got[:2], wanted[:2], strict=True):
            torch.testing.assert_close(ours, theirs)
        assert torch.equal(got.argmax, logits.argmax(1))


def test_other_functions_take_what_lies_anyhow() -> None:
    x, y, w = (torch.randn(s, dtype=torch.float64) for s in ((6, 4), (6, 4), (5, 4)))
    indices, rows = torch.tensor([[1, 2, 1], [0, 3, 2]]), torch.randint(5, (6,))
    calls = {
        "mse_loss": lambda f, a, b, c: f.mse_loss(a, b),
        "mse_loss of expanded": lambda f, a, b, c: f.mse_loss(a, b[:1].expand(6, 4), reduction="none"),
        "linear": lambda f, a, b, c: f.linear(a, c, b[:5, 0]),
        "linear_cross_entropy": lambda f, a, b, c: (
            f.linear_cross_entropy(a, c, rows) if f is F else f.cross_entropy(a @ c.T, rows)
        ),
        "embedding": lambda f, a, b, c: f.embedding(indices.T.contiguous().T, c, padding_idx=1),
        "layer_norm": lambda f, a, b, c: f.layer_norm(a, a.shape, b, b),
        "rms_norm": lambda f, a, b, c: f.rms_norm(a, (4,), c[0]),
        "embedding_bag": lambda f, a, b, c: f.embedding_bag(
            indices.T.contiguous().T, c, mode="sum", per_sample_weights=a[:2, :3]
        ),
    }
    for call in calls.values():
        for a, b, c in zip(layouts(x), reversed(list(layouts(y))), layouts(w), strict=True):
            results = []
            for functions in (F, TF):
                points = [leaf(t) for t in (a, b, c)]
                out = call(functions, *points)
                grads = torch.autograd.grad(out.sin().sum(), points, allow_unused=True)
                results.append([out, *(g for g in grads if g is not None)])
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs)


PLACED: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.t().contiguous().t(),
    "channels last": lambda t: t.view(2, 3, 2, 4).contiguous(memory_format=torch.channels_last),
    "every second row": lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2],
    "every second column": lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_parameters_and_gradients_may_lie_anyhow(name: str, flags: dict[str, bool]) -> None:
    """Beside a parameter that kernels serve; states lie as torch's do."""
    options = {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {}), **flags}
    for of_p, of_grad in itertools.product(PLACED, PLACED):
        if of_p == "expanded":
            continue
        results = []
        for module in (torch.optim, optim):
            torch.manual_seed(0)
            p, other = PLACED[of_p](torch.randn(6, 8)).detach().requires_grad_(), torch.randn(5).requires_grad_()
            optimizer = getattr(module, name)([p, other], **options)
            for _ in range(2):
                p.grad, other.grad = PLACED[of_grad](torch.randn(6, 8)).reshape(p.shape), torch.randn(5)
                optimizer.step()
            states = [t for q in (p, other) for t in optimizer.state[q].values() if isinstance(t, Tensor)]
            results.append([t.detach() for t in (p, other, *states)])
        for ours, theirs in zip(*results, strict=True):
            assert ours.stride() == theirs.stride(), (of_p, of_grad)
            torch.testing.assert_close(ours, theirs, msg=lambda text, at=(of_p, of_grad): f"{at}: {text}")
