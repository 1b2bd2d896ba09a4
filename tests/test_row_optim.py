"""Row gradients: what a dense optimizer does, at the cost of a batch, whoever reads the table in between."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import INTERPRETING, assert_accurate, kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from row_tables import D, V, batches, embedding, results, train
from torch import Tensor

import llmkern
from llmkern import dispatch, optim
from llmkern.nn import Embedding
from llmkern.ops import row_optim as ops_row_optim

OP = "row_optim"
KERNELS = kernels(OP)
NATIVE = dispatch.unavailable("native") is None
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


# Steps of a training. A row that waits for all of them waits long enough for the closed form to be one.
STEPS = 5 if INTERPRETING else 60


@pytest.fixture
def backend(backend: str) -> str:
    """torch has no such thing."""
    if backend == "torch":
        pytest.skip("torch has no row gradients")
    return backend


def run(name: str, library: Any, dtype: torch.dtype, rows: Any = False, steps: int = STEPS) -> list[Tensor]:
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


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replay_has_the_bits_of_the_dense_optimizer(kernel: str, name: str, dtype: torch.dtype) -> None:
    kind, options = OPTIMIZERS[name]
    if INTERPRETING and dtype != torch.float32 and name not in ("adam", "nesterov"):
        pytest.skip("the same kernels, slowly")
    # In float16 the default of 1e-8 is 0.
    if dtype == torch.float16 and "eps" in getattr(torch.optim, kind)([torch.zeros(1)]).defaults:
        options = {"eps": 1e-3} | options
    dense, rows = Embedding(V, D, dtype=dtype), Embedding(V, D, dtype=dtype, row_grad="replay")
    rows.load_state_dict(dense.state_dict())
    optimizers = [getattr(optim, kind)(module.parameters(), **options) for module in (dense, rows)]
    with llmkern.backend(kernel):
        for module, optimizer in zip((dense, rows), optimizers, strict=True):
            train(module, optimizer, batches(STEPS))
    for want, got in zip(results(dense, optimizers[0]), results(rows, optimizers[1]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("width", [D, 600])
def test_a_hot_row_has_the_bits_of_the_dense_gradient(kernel: str, width: int) -> None:
    """300 lookups of one row are added up in chunks, in both; fewer in another order, which is the same too."""
    dense, rows = Embedding(V, width), Embedding(V, width, row_grad="replay")
    rows.load_state_dict(dense.state_dict())
    for module in (dense, rows):
        optimizer = optim.Adam(module.parameters())
        g = torch.Generator().manual_seed(0)
        for n in (300, 129, 128, 40, 9, 3):
            optimizer.zero_grad()
            with llmkern.backend(kernel):
                module(torch.full((n,), 5)).backward(torch.randn(n, width, generator=g))
                optimizer.step()
    assert torch.equal(rows.weight.detach(), dense.weight.detach())


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


@pytest.mark.parametrize("folded", [False, True])
def test_clipping_sees_the_norm_of_the_summed_gradient(folded: bool) -> None:
    """Rows that repeat count with their sum; a dense parameter beside the table shares the norm."""

    def training(m: Any, library: Any, ours: bool) -> list[Tensor]:
        bias = torch.zeros(D, requires_grad=True)
        options = {"max_grad_norm": 0.7} if ours and folded else {}
        optimizer = library.AdamW([*m.parameters(), bias], lr=0.1, **options)
        norms = []
        for indices, dout in batches(6):
            optimizer.zero_grad()
            ((m(torch.cat([indices, indices])) + bias) * torch.cat([dout, 2 * dout]).float()).sum().backward()
            if not options:
                clip = optim.clip_grad_norm_ if ours else torch.nn.utils.clip_grad_norm_
                norms.append(clip([*m.parameters(), bias], 0.7))
            optimizer.step()
            if options:
                norms.append(optimizer.grad_norm.float())
        return [m.weight.detach(), bias.detach(), torch.stack(norms)]

    got, want = training(embedding(rows=True), optim, True), training(embedding(), torch.optim, False)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


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
