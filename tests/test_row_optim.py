"""Row gradients: what a dense optimizer does, at the cost of a batch, whoever reads the table in between."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from checks import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llmkern
from llmkern import dispatch, optim
from llmkern.nn import Embedding
from llmkern.ops import RowParameter
from llmkern.ops import row_optim as ops_row_optim

NATIVE = dispatch.unavailable("native") is None
# An odd number of columns has a tail in every vector length; 130 passes the four vectors that are summed together.
V, D, N = 40, 131, 9

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("Adam", {"lr": 1e-2}),
    "adam-betas": ("Adam", {"lr": 1e-2, "betas": (0.6, 0.95), "eps": 1e-4}),
    "adam-slow": ("Adam", {"lr": 1e-2, "betas": (0.99, 0.9)}),
    "adam-l2": ("Adam", {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw": ("AdamW", {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}),
    "amsgrad": ("AdamW", {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}),
    "sgd": ("SGD", {"lr": 1e-2}),
    "sgd-decay": ("SGD", {"lr": 1e-2, "weight_decay": 0.1}),
    "momentum": ("SGD", {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3}),
    "nesterov": ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adagrad": ("Adagrad", {"lr": 1e-2, "lr_decay": 0.01}),
    "adagrad-decay": ("Adagrad", {"lr": 1e-2, "weight_decay": 0.1}),
}


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """torch has no such thing."""
    if (reason := dispatch.unavailable(request.param)) is not None:
        pytest.skip(reason)
    with llmkern.backend(request.param):
        yield request.param


def embedding(dtype: torch.dtype = torch.float32, rows: Any = False, **options: Any) -> torch.nn.Embedding:
    """The same table in every dtype, of torch or with row gradients."""
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    if rows:
        return Embedding(V, D, _weight=table, row_grad=rows, **options)
    return torch.nn.Embedding(V, D, _weight=table, **options)


def batches(steps: int, seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Indices (N), some rows much more often than others and the last two never; their gradients (N, D) in fp64."""
    g = torch.Generator().manual_seed(seed)
    return [
        (
            (torch.rand(N, generator=g) ** 3 * (V - 2)).long(),
            torch.randn(N, D, generator=g, dtype=torch.float64).float().double(),
        )
        for _ in range(steps)
    ]


def cosine(step: int, warmup: int, total: int) -> float:
    return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / total))


def train(
    module: torch.nn.Embedding, optimizer: torch.optim.Optimizer, steps: list[tuple[Tensor, Tensor]], first: int = 0
) -> None:
    lr = optimizer.defaults["lr"]
    for i, (indices, dout) in enumerate(steps, first):
        optimizer.param_groups[0]["lr"] = lr * cosine(i, 20, 400)
        optimizer.zero_grad()
        module(indices).backward(dout.to(module.weight.dtype))
        optimizer.step()


def results(module: torch.nn.Embedding, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The table and its states as others read them."""
    states = optimizer.state_dict()["state"].get(0, {})
    return [module.state_dict()["weight"].clone(), *(states[key] for key in sorted(states) if states[key] is not None)]


def run(name: str, library: Any, dtype: torch.dtype, rows: Any = False, steps: int = 60) -> list[Tensor]:
    module = embedding(dtype, rows)
    kind, options = OPTIMIZERS[name]
    optimizer = getattr(library, kind)(module.parameters(), **options)
    train(module, optimizer, batches(steps))
    return results(module, optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_dense_optimizer(backend: str, name: str) -> None:
    with llmkern.backend("auto"):
        right, own = run(name, torch.optim, torch.float64), run(name, torch.optim, torch.float32)
    for rows in (True, "replay"):
        for got, want, theirs in zip(run(name, optim, torch.float32, rows), right, own, strict=True):
            assert_accurate(got, want.double(), theirs)


@pytest.mark.skipif(not NATIVE, reason="the native library is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replay_has_the_bits_of_the_dense_optimizer(name: str, dtype: torch.dtype) -> None:
    kind, options = OPTIMIZERS[name]
    # In float16 the default of 1e-8 is 0.
    if dtype == torch.float16 and "eps" in getattr(torch.optim, kind)([torch.zeros(1)]).defaults:
        options = {"eps": 1e-3} | options
    dense, rows = Embedding(V, D, dtype=dtype), Embedding(V, D, dtype=dtype, row_grad="replay")
    rows.load_state_dict(dense.state_dict())
    optimizers = [getattr(optim, kind)(module.parameters(), **options) for module in (dense, rows)]
    with llmkern.backend("native"):
        for module, optimizer in zip((dense, rows), optimizers, strict=True):
            train(module, optimizer, batches(60))
    for want, got in zip(results(dense, optimizers[0]), results(rows, optimizers[1]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["adam", "adamw", "amsgrad", "momentum"])
def test_two_thousand_steps_through_checkpoints_and_torch(name: str) -> None:
    """Warmup, cosine and decay; resumed from a checkpoint, moved to torch's optimizer and back on the way."""
    kind, options = OPTIMIZERS[name]
    steps = batches(2000)

    def dense(dtype: torch.dtype) -> list[Tensor]:
        module = embedding(dtype)
        optimizer = getattr(torch.optim, kind)(module.parameters(), **options)
        train(module, optimizer, steps)
        return results(module, optimizer)

    def moved(module: torch.nn.Embedding, optimizer: Any, to: Any, rows: bool) -> tuple[torch.nn.Embedding, Any]:
        file = io.BytesIO()
        torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file)
        module = embedding(rows=rows)
        module.load_state_dict(saved["model"])
        optimizer = getattr(to, kind)(module.parameters(), **options)
        optimizer.load_state_dict(saved["optimizer"])
        return module, optimizer

    module = embedding(rows=True)
    optimizer = getattr(optim, kind)(module.parameters(), **options)
    for (first, last), (to, rows) in zip(
        itertools.pairwise((0, 300, 900, 1100, 2000)),
        [(optim, True), (torch.optim, False), (optim, True), (optim, True)],
        strict=True,
    ):
        train(module, optimizer, steps[first:last], first)
        module, optimizer = moved(module, optimizer, to, rows)
    right, own = dense(torch.float64), dense(torch.float32)
    for got, want, theirs in zip(results(module, optimizer), right, own, strict=True):
        assert_accurate(got, want.double(), theirs)


@settings(max_examples=30, deadline=None)
@given(
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999)),
    eps=st.sampled_from([0.0, 1e-12, 1e-8, 1e-3]),
    size=st.sampled_from([1e-12, 1e-8, 1e-6, 1e-3, 1.0, 1e3]),
    decay=st.sampled_from([0.0, 0.1]),
    amsgrad=st.booleans(),
    gaps=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    start=st.sampled_from([0, 50, 5000]),
)
def test_any_gap_and_any_size_of_gradients(
    betas: tuple[float, float], eps: float, size: float, decay: float, amsgrad: bool, gaps: list[int], start: int
) -> None:
    """The closed form where eps matters and where it does not, early and late: never less accurate than the loop."""
    options = {"lr": 1e-2, "betas": betas, "eps": eps, "weight_decay": decay, "amsgrad": amsgrad}

    def stepped(library: Any, dtype: torch.dtype, rows: bool) -> list[Tensor]:
        module = embedding(dtype, rows)
        optimizer = library.AdamW(module.parameters(), **options)
        g = torch.Generator().manual_seed(4)
        for gap in gaps:
            for wait in range(gap + 1):
                # Row 1 has gradients, spread over four orders of magnitude; row 0 keeps the others waiting.
                row = torch.tensor([int(wait == 0)])
                spread = torch.logspace(-2, 2, D, dtype=torch.float64)
                dout = (size * spread * torch.randn(1, D, generator=g, dtype=torch.float64)).float().to(dtype)
                optimizer.zero_grad()
                module(row).backward(dout)
                if start and not optimizer.state:
                    optimizer.step()
                    optimizer.state[module.weight]["step"].fill_(start)
                else:
                    optimizer.step()
        return [t[:2] if t.dim() else t for t in results(module, optimizer)]

    right = stepped(torch.optim, torch.float64, False)
    own = stepped(torch.optim, torch.float32, False)
    for got, want, theirs in zip(stepped(optim, torch.float32, True), right, own, strict=True):
        if bool(torch.isfinite(want).all()):
            assert_accurate(got, want.double(), theirs)


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


def step_pairs(module: Any, dense: Any, make: Callable[[Any, Any], Any], loss: Callable[..., Tensor], n: int) -> None:
    """The same training of both: `loss(module, i)`; their tables must agree."""
    optimizers = make(optim, module.parameters()), make(torch.optim, dense.parameters())
    for i in range(n):
        for m, optimizer in zip((module, dense), optimizers, strict=True):
            optimizer.zero_grad()
            value = loss(m, i)
            if value is not None:
                value.backward()
                optimizer.step()
    for got, want in zip(results(module, optimizers[0]), results(dense, optimizers[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def adamw(library: Any, parameters: Any) -> Any:
    return library.AdamW(parameters, lr=0.05, weight_decay=0.1)


def test_several_lookups_accumulation_and_skipped_steps() -> None:
    draws = batches(40)

    def loss(m: Any, i: int) -> Tensor | None:
        if i % 7 == 6:
            # Nothing was looked up: no gradient, no step, as in torch.
            return None
        (first, dout), (second, _) = draws[i], draws[-i]
        total = (m(first) * dout.float()).sum() + (m(second).view(3, 3, D) ** 2).sum()
        if i % 5 == 4:
            (m(second) * dout.float()).sum().backward()
        return total

    step_pairs(embedding(rows=True), embedding(), adamw, loss, 20)


def test_padding_has_no_gradient_and_an_empty_batch_is_a_step() -> None:
    def loss(m: Any, i: int) -> Tensor:
        indices = batches(1, seed=i)[0][0] if i % 3 else torch.empty(0, dtype=torch.int64)
        return (m(indices) ** 2).sum() * (i + 1)

    step_pairs(embedding(rows=True, padding_idx=-V), embedding(padding_idx=0), adamw, loss, 9)


def test_a_tied_output_layer_makes_the_step_dense() -> None:
    def loss(m: Any, i: int) -> Tensor:
        looked_up = m(batches(1, seed=i)[0][0])
        # Every other step has row gradients only.
        return (looked_up @ m.weight.T).logsumexp(-1).sum() if i % 2 else (looked_up**2).sum()

    step_pairs(embedding(rows=True), embedding(), adamw, loss, 8)


def test_numbers_of_a_step_may_change() -> None:
    module, dense = embedding(rows=True), embedding()
    optimizers = optim.AdamW(module.parameters()), torch.optim.AdamW(dense.parameters())
    changes = [
        {"eps": 1e-4},
        {"betas": (0.8, 0.9)},
        {"weight_decay": 0.3},
        {"lr": torch.tensor(0.01)},
        {"maximize": True},
    ]
    for i, change in enumerate(changes):
        for m, optimizer in zip((module, dense), optimizers, strict=True):
            for indices, dout in batches(6, seed=i):
                optimizer.zero_grad()
                m(indices).backward(dout.float())
                optimizer.step()
            optimizer.param_groups[0].update(change)
    for got, want in zip(results(module, optimizers[0]), results(dense, optimizers[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_a_full_record_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_row_optim, "CAPACITY", 7)
    want = run("adamw", torch.optim, torch.float32)
    for got, theirs in zip(run("adamw", optim, torch.float32, True), want, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-6)


def test_a_scaler_skips_steps_with_infinite_gradients() -> None:
    def training(m: Any, optimizer: Any) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for i, (indices, dout) in enumerate(batches(9)):
            optimizer.zero_grad()
            bad = float("inf") if i in (2, 5) else 1.0
            scaler.scale((m(indices) * dout.float() * bad).sum()).backward()
            scaler.step(optimizer)
            scaler.update()

    module, dense = embedding(rows=True), embedding()
    optimizers = optim.Adam(module.parameters(), lr=0.1), torch.optim.Adam(dense.parameters(), lr=0.1)
    training(module, optimizers[0])
    training(dense, optimizers[1])
    for got, want in zip(results(module, optimizers[0]), results(dense, optimizers[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_two_optimizers_of_one_table_take_turns() -> None:
    def training(m: Any, library: Any) -> Tensor:
        pair = library.Adam(m.parameters(), lr=0.1), library.SGD(m.parameters(), lr=0.1, momentum=0.9)
        for i, (indices, dout) in enumerate(batches(12)):
            m.zero_grad()
            m(indices).backward(dout.float())
            pair[i % 2].step()
        return m.weight.detach()

    torch.testing.assert_close(
        training(embedding(rows=True), optim), training(embedding(), torch.optim), rtol=1e-5, atol=1e-6
    )


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


def test_nan_stays_in_its_row() -> None:
    module = embedding(rows=True)
    optimizer = optim.Adam(module.parameters(), lr=0.1)
    for i in range(4):
        optimizer.zero_grad()
        out = module(torch.tensor([1, 2, 3 + i]))
        dout = torch.ones_like(out)
        dout[1, 5] = float("nan")
        out.backward(dout)
        optimizer.step()
    bad = module.weight.detach().isnan().nonzero().tolist()
    assert bad == [[2, 5]]


@pytest.mark.skipif(not NATIVE, reason="the native library is not built")
def test_the_number_of_threads_changes_no_bit() -> None:
    """A run of 600 equal rows is cut by columns; so is none of the others."""

    def training(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            module = embedding(rows=True)
            optimizer = optim.AdamW(module.parameters(), lr=0.1)
            g = torch.Generator().manual_seed(0)
            for _ in range(5):
                indices = torch.cat([torch.full((600,), 3), torch.randint(V, (100,), generator=g)])
                optimizer.zero_grad()
                module(indices).backward(torch.randn(700, D, generator=g))
                optimizer.step()
            return results(module, optimizer)
        finally:
            torch.set_num_threads(before)

    for one, many in zip(training(1), training(3), strict=True):
        assert torch.equal(one, many)


def test_a_compiled_model_sees_what_is_pending() -> None:
    module, dense = embedding(rows=True), embedding()
    compiled = torch.compile(module, backend="eager")
    optimizers = optim.Adam(module.parameters(), lr=0.1), torch.optim.Adam(dense.parameters(), lr=0.1)
    for indices, dout in batches(6):
        for forward, optimizer in ((compiled, optimizers[0]), (dense, optimizers[1])):
            optimizer.zero_grad()
            forward(indices).backward(dout.float())
            optimizer.step()
    torch.testing.assert_close(module.weight.detach(), dense.weight.detach(), rtol=1e-5, atol=1e-6)


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


def test_explain_tells_who_steps() -> None:
    module = embedding(rows=True)
    optimizer = optim.Adam(module.parameters())
    module(torch.tensor([1])).sum().backward()
    assert llmkern.explain(optimizer.step).choices[0].op == "row_optim"
    with llmkern.backend("torch"), pytest.raises(dispatch.BackendError, match="row_grad"):
        optimizer.step()
