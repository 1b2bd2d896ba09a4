"""Tensors that are not plain: what a kernel cannot read takes torch's own function, as if we were not there."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as TF
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

import llmkern
import llmkern.functional as LF
import llmkern.optim
from llmkern import nn

INDICES, TARGET = torch.tensor([[1, 2, 1], [0, 3, 2]]), torch.tensor([1, 2, -100])


class Wrapper(Tensor):
    """Knows aten's ops, and has no memory."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace in ("aten", "prim"), func
        args, kwargs = args, kwargs or {}
        bare = tree_map(lambda t: t.inner if isinstance(t, Wrapper) else t, (args, kwargs))
        out = tree_map(lambda t: Wrapper(t) if isinstance(t, Tensor) else t, func(*bare[0], **bare[1]))
        return return_and_correct_aliasing(func, args, kwargs, out)


class Harmless(Tensor):
    """A subclass with memory of its own."""


FAKE = FakeTensorMode()
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "wrapper": lambda t: Wrapper(t.detach()),
    "harmless": lambda t: t.detach().as_subclass(Harmless),
    "meta": lambda t: t.detach().to("meta"),
    "fake": lambda t: FAKE.from_tensor(t.detach()),
    "negated view": lambda t: torch._neg_view(-t.detach()) if t.is_floating_point() else t,
    "buffer": lambda t: torch.nn.Buffer(t.detach()),
}


def recurrent(name: str, gates: int) -> Callable[..., Any]:
    def call(F: Any, x: Tensor, w: Tensor) -> Any:
        function = getattr(F if F is LF else torch._VF, name)
        h = x[:, :2].cos()
        if name.endswith("_cell"):
            return function(x, (h, h) if gates == 4 else h, w, w[:, :2], w[:, 0], w[:, 1])
        h = h.unsqueeze(0)
        states = (h, h) if gates == 4 else h
        weights = [w, w[:, :2], w[:, 0], w[:, 1]]
        return function(x.unsqueeze(0), states, weights, True, 1, 0.0, False, False, False)

    return call


CASES: dict[str, tuple[Callable[..., Any], tuple[int, int], tuple[int, int]]] = {
    "embedding": (lambda F, w, _: F.embedding(_beside(INDICES, w), w, padding_idx=1), (5, 4), (1, 1)),
    "embedding_bag": (lambda F, w, _: F.embedding_bag(_beside(INDICES, w), w, mode="sum"), (5, 4), (1, 1)),
    "linear": (lambda F, x, w: F.linear(x, w), (3, 4), (5, 4)),
    "cross_entropy": (lambda F, x, _: F.cross_entropy(x, _beside(TARGET, x)), (3, 4), (1, 1)),
    "probabilities": (lambda F, x, p: F.cross_entropy(x, p), (3, 4), (3, 4)),
    "nll_loss": (lambda F, x, _: F.nll_loss(x, _beside(TARGET, x)), (3, 4), (1, 1)),
    "mse_loss": (lambda F, x, y: F.mse_loss(x, y), (3, 4), (3, 4)),
    "layer_norm": (lambda F, x, w: F.layer_norm(x, (4,), w[0]), (3, 4), (2, 4)),
    "rms_norm": (lambda F, x, w: F.rms_norm(x, (4,), w[0]), (3, 4), (2, 4)),
    "dropout": (lambda F, x, _: F.dropout(x, 1.0), (3, 4), (1, 1)),
    "lstm": (recurrent("lstm", 4), (3, 4), (8, 4)),
    "gru": (recurrent("gru", 3), (3, 4), (6, 4)),
    "lstm_cell": (recurrent("lstm_cell", 4), (3, 4), (8, 4)),
    "rnn_tanh_cell": (recurrent("rnn_tanh_cell", 1), (3, 4), (2, 4)),
}
if hasattr(TF, "linear_cross_entropy"):
    CASES["linear_cross_entropy"] = (
        lambda F, x, w: F.linear_cross_entropy(x, w, _beside(TARGET, x)),
        (3, 4),
        (5, 4),
    )


def _beside(indices: Tensor, t: Tensor) -> Tensor:
    """Indices where ``t`` is."""
    if isinstance(t, torch._subclasses.FakeTensor):
        return FAKE.from_tensor(indices)
    return indices.to(t.device)


def bare(t: Tensor) -> Tensor:
    return t.inner if isinstance(t, Wrapper) else t


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_every_function_gives_what_torchs_gives(case: str, kind: str) -> None:
    function, *shapes = CASES[case]
    results = []
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for functions in (LF, TF):
        points = [KINDS[kind](value).requires_grad_() for value in values]
        with FAKE if kind == "fake" else nullcontext():
            out = function(functions, *points)
            out = [out] if isinstance(out, Tensor) else list(out)
            grads = torch.autograd.grad([y.sum() for y in out], points, allow_unused=True)
        results.append([*out, *(g for g in grads if g is not None)])
    assert len(results[0]) == len(results[1])
    for ours, theirs in zip(*results, strict=True):
        assert type(ours) is type(theirs)
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        if kind not in ("meta", "fake"):
            torch.testing.assert_close(bare(ours).as_subclass(Tensor), bare(theirs).as_subclass(Tensor))


def test_explain_says_so() -> None:
    x, w = (Wrapper(torch.randn(3, 4)) for _ in range(2))
    said = llmkern.explain(LF.mse_loss, x, w)
    assert said.backends == ("torch",)
    assert "does not serve tensors of class Wrapper" in str(said)
    meta = llmkern.explain(LF.embedding, INDICES.to("meta"), torch.empty(5, 4, device="meta"))
    assert meta.backends == ("torch",)


def test_options_of_ours_take_the_reference() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    got = LF.cross_entropy(Wrapper(x), TARGET, z_loss=0.1, softcap=5.0)
    torch.testing.assert_close(got.inner, LF.cross_entropy(x, TARGET, z_loss=0.1, softcap=5.0))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(layout: torch.layout) -> None:
    rows = [torch.randn(2, 4), torch.randn(3, 4)]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    weight = torch.randn(5, 4)
    for got, row in zip(LF.linear(nested, weight).unbind(), rows, strict=True):
        torch.testing.assert_close(got, TF.linear(row, weight))
    assert LF.dropout(nested, 0.5, training=False) is not None
    ids = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3, 0, 1])], layout=layout)
    for got, row in zip(LF.embedding(ids, weight).unbind(), ids.unbind(), strict=True):
        assert torch.equal(got, weight[row])


class Logging(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **kwargs or {})


def test_a_dispatch_mode_sees_our_ops_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    cell, x = nn.LSTMCell(4, 3), torch.randn(2, 4)

    def run() -> list[Tensor]:
        loss = LF.cross_entropy(model(INDICES).flatten(0, 1), INDICES.flatten())
        h, c = cell(x, (x[:, :3], x[:, :3]))
        return [loss, h, *torch.autograd.grad(loss + h.sum() + c.sum(), [*model.parameters(), *cell.parameters()])]

    expected = run()
    with Logging() as mode:
        got = run()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert any("llmkern" in name for name in mode.names)


def test_optimizers_and_clipping_of_wrapped_parameters() -> None:
    values, gradient = torch.randn(4, 3), torch.randn(4, 3)
    for name, options in (("SGD", {"momentum": 0.9}), ("Adam", {}), ("AdamW", {}), ("Adagrad", {})):
        ours, theirs = torch.nn.Parameter(Wrapper(values.clone())), torch.nn.Parameter(values.clone())
        ours.grad, theirs.grad = Wrapper(gradient.clone()), gradient.clone()
        steps = [getattr(o, name) for o in (llmkern.optim, torch.optim)]
        norms = [nn.utils.clip_grad_norm_([ours], 0.5), torch.nn.utils.clip_grad_norm_([theirs], 0.5)]
        torch.testing.assert_close(norms[0].inner, norms[1])
        for step, p in zip(steps, (ours, theirs), strict=True):
            step([p], lr=0.1, **options).step()
        torch.testing.assert_close(ours.inner, theirs.data)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.out = nn.Embedding(16, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return LF.cross_entropy(self.out(self.layer(self.embed(ids))[0][:, -1]), ids[:, 0])


def _train_sharded(rank: int, world: int, path: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(path, world), rank=rank, world_size=world)
    mesh, ids = init_device_mesh("cpu", (world,)), torch.arange(12).view(2, 6)
    for name, options in (("Adam", {}), ("SGD", {"momentum": 0.9}), ("Adagrad", {}), ("AdamW", {"max_grad_norm": 0.1})):
        torch.manual_seed(0)
        model = Model()
        whole = copy.deepcopy(model)
        fully_shard(model, mesh=mesh)
        steps = [getattr(llmkern.optim, name)(m.parameters(), lr=0.1, **options) for m in (model, whole)]
        for _ in range(2):
            for m, step in zip((model, whole), steps, strict=True):
                step.zero_grad()
                m(ids).backward()
            if not options:
                norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.5) for m in (model, whole)]
                torch.testing.assert_close(norms[0].full_tensor(), norms[1])
            for step in steps:
                step.step()
        for sharded, p in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(sharded.full_tensor(), p.data)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_fully_sharded_models_train_as_whole_ones(world: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, str(Path(folder) / "store"))
        torch.multiprocessing.start_processes(_train_sharded, arguments, world, start_method="fork")
