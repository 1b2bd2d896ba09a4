"""Parameters with row gradients: who reads one finds what the dense optimizer would have left."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from row_tables import D, Pair, V, batches, embedding, train

import llmkern
import llmkern.functional as F
from llmkern import dispatch, optim
from llmkern.nn import Embedding
from llmkern.ops import RowParameter

OP = "row_optim"


@pytest.fixture
def backend(backend: str) -> str:
    """torch has no such thing."""
    if backend == "torch":
        pytest.skip("torch has no row gradients")
    return backend


READS: dict[str, Callable[[Any, Any], Any]] = {
    "weight": lambda module, _: module.weight + 0,
    "data": lambda module, _: module.weight.data,
    "state_dict": lambda module, _: module.state_dict()["weight"],
    "parameters": lambda module, _: torch.nn.utils.parameters_to_vector(module.parameters()).view(V, D),
    "deepcopy": lambda module, _: copy.deepcopy(module).weight,
    "pickle": lambda module, _: pickle.loads(pickle.dumps(module)).weight,
    "lookup": lambda module, _: module(torch.arange(V)),
    "lookup without grad": lambda module, _: torch.no_grad()(module)(torch.arange(V, dtype=torch.int32)),
    "torch's lookup": lambda module, _: torch.nn.functional.embedding(torch.arange(V), module.weight),
    "tied layer": lambda module, _: llmkern.nn.functional.linear(torch.eye(D), module.weight).T,
    "item": lambda module, _: torch.tensor([[x.item() for x in row] for row in module.weight]),
    "numpy": lambda module, _: torch.from_numpy(module.weight.detach().numpy()),
    "foreach": lambda module, _: torch._foreach_add([module.weight], 0.0)[0],
    "optimizer": lambda module, optimizer: (optimizer.state_dict(), module.weight.table.param)[1],
    "pickled optimizer": lambda module, optimizer: (pickle.dumps(optimizer), module.weight.table.param)[1],
    "optimizer's catch_up": lambda module, optimizer: (optimizer.catch_up(), module.weight.table.param)[1],
}


@pytest.mark.parametrize("rows", [True, "replay"])
@pytest.mark.parametrize("read", READS)
def test_every_read_finds_the_dense_values(read: str, rows: Any) -> None:
    module, dense = embedding(rows=rows), embedding()
    optimizers = optim.AdamW(module.parameters(), lr=0.1), torch.optim.AdamW(dense.parameters(), lr=0.1)
    train(module, optimizers[0], batches(12))
    train(dense, optimizers[1], batches(12))
    assert module.weight.table.count == 12, "nothing was pending"
    got = READS[read](module, optimizers[0])
    torch.testing.assert_close(got.detach().view(V, D), dense.weight.detach(), rtol=1e-5, atol=1e-6)


def test_what_is_not_a_read_of_elements_leaves_steps_pending() -> None:
    module = embedding(rows=True)
    optimizer = optim.Adam(module.parameters())
    train(module, optimizer, batches(3))
    assert module.weight.shape == (V, D)
    assert module.weight.dtype == torch.float32
    assert module.weight.requires_grad
    assert module.weight.grad.is_sparse
    assert list(module.eval().named_parameters())
    assert "row_grad=True" in repr(module)
    optimizer.zero_grad()
    assert module.weight.table.count == 3


def test_a_write_comes_after_the_pending_steps() -> None:
    module, dense = embedding(rows=True), embedding()
    optimizers = optim.Adam(module.parameters(), lr=0.1), torch.optim.Adam(dense.parameters(), lr=0.1)
    for i in range(3):
        for m, optimizer in zip((module, dense), optimizers, strict=True):
            train(m, optimizer, batches(5, seed=i))
            with torch.no_grad():
                m.weight.mul_(0.5)
            m.weight.data = m.weight.data.clone()
            m.weight.data[3] = 1.0
    torch.testing.assert_close(module.weight.detach(), dense.weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("index", [V, -1, 2**31])
def test_a_bad_index_is_torchs_error_and_changes_nothing(backend: str, index: int) -> None:
    module = embedding(rows=True)
    optimizer = optim.Adam(module.parameters(), lr=0.1)
    train(module, optimizer, batches(3))
    before = module.weight.detach().clone()
    train(module, optimizer, [])
    with pytest.raises(IndexError, match=r"^index out of range in self$"):
        module(torch.tensor([1, index]))
    assert torch.equal(module.weight.detach(), before)


def test_a_compiled_model_keeps_row_gradients() -> None:
    module, dense = embedding(rows=True), embedding()
    compiled = torch.compile(module, backend="eager")
    optimizers = optim.Adam(module.parameters(), lr=0.1), torch.optim.Adam(dense.parameters(), lr=0.1)
    for indices, dout in batches(6):
        for forward, optimizer in ((compiled, optimizers[0]), (dense, optimizers[1])):
            optimizer.zero_grad()
            forward(indices).backward(dout.float())
            optimizer.step()
    assert module.weight.table.count == 6
    torch.testing.assert_close(module.weight.detach(), dense.weight.detach(), rtol=1e-5, atol=1e-6)


class _Tied(torch.nn.Module):
    def __init__(self, table: torch.nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return llmkern.nn.functional.linear(self.table(indices), self.table.weight).tanh() @ self.table.weight


@pytest.mark.parametrize("model", [lambda table: table, _Tied], ids=["lookup", "tied"])
@pytest.mark.parametrize("pretrained", [False, True], ids=["new", "pending"])
def test_one_compiled_graph_reads_all_rows_and_trains_them_densely(model: Any, pretrained: bool) -> None:
    module, dense = embedding(rows="replay"), Embedding(V, D, _weight=embedding().weight.data)
    optimizers = [optim.AdamW(m.parameters(), lr=0.01) for m in (module, dense)]
    seen: list[str] = []
    module.weight.register_hook(lambda grad: seen.append("hook"))
    forwards = [torch.compile(model(module), backend="aot_eager", fullgraph=True), model(dense)]
    for i in range(6):
        if pretrained and i % 2 == 0:
            # Eager steps between the compiled ones: rows wait when the graph runs.
            for m, optimizer in zip((module, dense), optimizers, strict=True):
                train(m, optimizer, batches(2, seed=i), first=i)
            assert module.weight.table.count == 2
        results = []
        for forward, optimizer in zip(forwards, optimizers, strict=True):
            optimizer.zero_grad()
            out = forward(batches(1, seed=i)[0][0])
            out.square().sum().backward()
            optimizer.step()
            results.append(out)
        torch.testing.assert_close(*results)
    assert not module.weight.grad.is_sparse
    assert len(seen) == 6 + 6 * pretrained
    with torch.no_grad():
        assert torch.equal(forwards[0](torch.arange(V)), model(module)(torch.arange(V)))
    torch.testing.assert_close(module.weight.detach(), dense.weight.detach(), rtol=1e-5, atol=1e-6)
    module.weight.data = torch.ones(V, D)
    assert torch.equal(forwards[0](torch.arange(V)), model(module)(torch.arange(V)))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_lookup_is_torchs_and_has_the_dense_values(strict: bool) -> None:
    pair = Pair()
    indices = torch.arange(V)
    program = torch.export.export(pair.rows, (indices,), strict=strict)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.embedding.default
    ]
    file = io.BytesIO()
    torch.export.save(program, file)
    assert b"RowParameter" not in file.getvalue()
    assert b"_row_tensors" not in file.getvalue()
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(indices), pair.dense(indices))
    pair.train()
    assert torch.equal(program.module()(indices), pair.dense(indices))


def test_prepare_takes_the_embeddings_that_can() -> None:
    model = torch.nn.ModuleDict(
        {
            "plain": torch.nn.Embedding(V, D),
            "ours": Embedding(V, D),
            "tied": torch.nn.Embedding(V, D),
            "head": torch.nn.Linear(D, V, bias=False),
            "renormalised": torch.nn.Embedding(V, D, max_norm=1.0),
            "counted": torch.nn.Embedding(V, D, scale_grad_by_freq=True),
            "sparse": torch.nn.Embedding(V, D, sparse=True),
        }
    )
    model["head"].weight = model["tied"].weight
    before = dict(model.named_parameters())
    assert optim.prepare(model) == ["plain", "ours"]
    assert all(p is before[name] for name, p in model.named_parameters())
    assert isinstance(model["plain"].weight, RowParameter)
    dense = copy.deepcopy(model["plain"].weight).data.clone()
    optimizer = optim.SGD(model["plain"].parameters(), lr=1.0)
    model["plain"](torch.tensor([[1, 1], [2, 3]])).sum().backward()
    assert model["plain"].weight.grad.is_sparse
    optimizer.step()
    dense[1] -= 2
    dense[2:4] -= 1
    torch.testing.assert_close(model["plain"].weight.data, dense)


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (5, 0), (1, 1)])
def test_tables_of_nothing(rows: int, columns: int) -> None:
    module = Embedding(rows, columns, row_grad=True)
    optimizer = optim.AdamW(module.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.zeros(2 if rows else 0, 3, dtype=torch.int32)).sum().backward()
        optimizer.step()
    dense = torch.nn.Embedding(rows, columns)
    dense.load_state_dict(module.state_dict())
    assert optimizer.state_dict()["state"][0]["step"] == 3
    assert torch.equal(module.weight.detach(), dense.weight.detach())


def test_optimizers_of_sparse_gradients_step_the_rows_that_come() -> None:
    rows, sparse = Embedding(V, D, row_grad=True), torch.nn.Embedding(V, D, sparse=True)
    sparse.load_state_dict(rows.state_dict())
    exact = optim.Adam(rows.parameters(), lr=0.1), torch.optim.Adam(sparse.parameters(), lr=0.1)
    lazy = optim.LazyAdam(rows.parameters(), lr=0.1), torch.optim.SparseAdam(sparse.parameters(), lr=0.1)
    for indices, dout in batches(4):
        for module, first, second in zip((rows, sparse), exact, lazy, strict=True):
            module.zero_grad()
            module(indices).backward(dout.float())
            grad = module.weight.grad
            module.weight.grad = grad if module is rows else grad.to_dense()
            first.step()
            module.weight.grad = grad
            second.step()
    torch.testing.assert_close(rows.weight.detach(), sparse.weight.detach(), rtol=1e-5, atol=1e-6)


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="row_grad: got 'rows', expected"):
        Embedding(V, D, row_grad="rows")  # type: ignore[arg-type]
    for option in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        with pytest.raises(ValueError, match="row_grad: got max_norm or scale_grad_by_freq"):
            Embedding(V, D, row_grad=True, **option)  # type: ignore[arg-type]
    module = embedding(rows=True)
    module(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        torch.optim.Adam(module.parameters()).step()


TOKENS = torch.tensor([[1, 2, 1], [3, 0, 5]])
KERNELS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda w: F.linear(torch.ones(64, D), w),
    "linear_cross_entropy": lambda w: F.linear_cross_entropy(torch.eye(7, D), w, torch.arange(7)),
    "mse_loss": lambda w: F.mse_loss(w, torch.ones(V, D)),
    "cross_entropy": lambda w: F.cross_entropy(w, torch.arange(V)),
    "embedding, max_norm": lambda w: F.embedding(TOKENS, w, max_norm=5.0),
    "embedding, scale_grad_by_freq": lambda w: F.embedding(TOKENS, w, scale_grad_by_freq=True),
    "embedding_bag": lambda w: F.embedding_bag(TOKENS, w, max_norm=5.0),
    "embedding_bag, max": lambda w: F.embedding_bag(TOKENS, w, mode="max"),
    "dropout": lambda w: F.dropout(w, 0.3),
    "cell": lambda w: llmkern.nn.GRUCell(D, 3)(w),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_read_tables_as_they_read_others(kernel: str) -> None:
    results, backends = [], []
    for side in ("rows", "dense"):
        weight = getattr(Pair(), side).weight
        outputs: list[torch.Tensor] = []
        torch.manual_seed(3)
        backends.append(llmkern.explain(lambda w=weight, out=outputs: out.append(KERNELS[kernel](w))).backends)
        (gradient,) = torch.autograd.grad(outputs[0].square().sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), weight)
        results.append([*outputs, gradient, second, weight.detach()])
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense)
    assert backends[0] == backends[1]


def test_dense_steps_of_tables_are_the_kernels() -> None:
    pair = Pair()
    for m, optimizer in zip((pair.rows, pair.dense), pair.optimizers, strict=True):
        optimizer.zero_grad()
        m.weight.square().sum().backward()
        assert llmkern.explain(optimizer.step).backends[-1] == "native"
    pair.train()
    assert pair.rows.weight.table.count == 3
    assert pair.agree()


@pytest.mark.parametrize("sparse", [False, True])
def test_the_kind_of_gradient_survives_copies_and_classes(sparse: bool) -> None:
    module = Embedding(V, D, sparse=sparse)
    state = {key: value for key, value in vars(module).items() if key != "_sparse"}
    earlier = Embedding.__new__(Embedding)
    earlier.__setstate__(state)
    torchs = copy.deepcopy(module)
    torchs.__class__ = torch.nn.Embedding
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), earlier, torchs):
        each(torch.tensor([1])).sum().backward()
        assert each.sparse == each.weight.grad.is_sparse == sparse
        each.zero_grad()
    module.sparse = not sparse
    module(torch.tensor([1])).sum().backward()
    assert module.weight.grad.is_sparse != sparse


def test_explain_tells_who_steps() -> None:
    module = embedding(rows=True)
    optimizer = optim.Adam(module.parameters())
    module(torch.tensor([1])).sum().backward()
    assert llmkern.explain(optimizer.step).choices[0].op == "row_optim"
    with llmkern.backend("torch"), pytest.raises(dispatch.BackendError, match="row_optim: backend 'torch' was forced"):
        optimizer.step()
