"""Optimizers on sparse gradients: every backend against fp64 formulas and torch's optimizers."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from checks import FLOATS, INTERPRETING, assert_accurate, kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llmkern
from llmkern import dispatch, optim, reference

OP = "sparse_adam"
NATIVE = dispatch.unavailable("native") is None
KERNELS = kernels("sparse_adam")
needs_native = pytest.mark.skipif(not NATIVE, reason="the native library is not built")
# torch's optimizer of the same name steps sparse gradients too, by these options.
TORCHS: dict[str, tuple[dict[str, Any], ...]] = {
    "SGD": ({"lr": 0.1}, {"lr": 0.1, "maximize": True}),
    "Adagrad": ({"lr": 0.1, "lr_decay": 0.5, "eps": 1e-3}, {"initial_accumulator_value": 0.3, "maximize": True}),
    "SparseAdam": ({"eps": 1e-3}, {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-3, "maximize": True}),
}
ALL = {**TORCHS, "LazyAdam": TORCHS["SparseAdam"], "RowWiseAdagrad": ({"eps": 1e-3}, {"lr": 0.1, "maximize": True})}
# Columns: one, tails of a vector, more than a thread's grain; a table of several dense dimensions, and of none.
SHAPES: tuple[tuple[int, ...], ...] = ((9, 1), (9, 19), (50, 128), (5, 2, 3), (7,), (4, 0))
if INTERPRETING:
    SHAPES = ((9, 19), (5, 2, 3), (7,), (4, 0))


def table(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def draw(p: Tensor, step: int, rounded_to: torch.dtype | None = None, scale: float = 1.0, n: int = 12) -> None:
    """A gradient that names rows several times, and others never."""
    g = torch.Generator().manual_seed(100 + step)
    indices = torch.randint(0, max(1, p.shape[0] - 2), (1, n), generator=g)
    values = scale * torch.randn(n, *p.shape[1:], generator=g, dtype=torch.float64)
    values = values.to(rounded_to or p.dtype).to(p.dtype)
    p.grad = torch.sparse_coo_tensor(indices, values, p.shape, check_invariants=True)


def values(optimizer: torch.optim.Optimizer, p: Tensor) -> list[Tensor]:
    state = optimizer.state[p]
    return [p.detach().clone(), *(state[key].clone() for key in sorted(state) if isinstance(state[key], Tensor))]


def train(optimizer: torch.optim.Optimizer, p: Tensor, steps: int, first: int = 0, **how: Any) -> list[Tensor]:
    for step in range(first, first + steps):
        draw(p, step, **how)
        optimizer.step()
    return values(optimizer, p)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", TORCHS)
def test_against_torch(backend: str, name: str, dtype: torch.dtype) -> None:
    for options in TORCHS[name]:
        for shape in SHAPES:

            def run(module: Any, wide: torch.dtype, options: Any = options, shape: Any = shape) -> list[Tensor]:
                p = table(dtype, shape).detach().to(wide).requires_grad_()
                return train(getattr(module, name)([p], **options), p, 4, rounded_to=dtype)

            ours, right, own = run(optim, dtype), run(torch.optim, torch.float64), run(torch.optim, dtype)
            for got, want, theirs in zip(ours, right, own, strict=True):
                assert_accurate(got, want.double(), theirs, scale=1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rowwise_adagrad(backend: str, dtype: torch.dtype) -> None:
    """Against the formula in fp64, rows added up by torch."""
    if backend == "torch":
        pytest.skip("torch has no such optimizer")
    for maximize in (False, True):
        for shape in SHAPES[:-1]:
            p = table(dtype, shape)
            numbers = {"lr": 0.1, "eps": 1e-3, "initial_accumulator_value": 0.2}
            optimizer = optim.RowWiseAdagrad([p], **numbers, maximize=maximize)
            right, total = p.detach().double(), torch.full((shape[0],), 0.2, dtype=torch.float64)
            for step in range(3):
                draw(p, step)
                g = p.grad.to(torch.float64).to_dense()
                total += g.reshape(shape[0], -1).square().mean(1)
                root = (total.sqrt() + 1e-3).reshape(-1, *[1] * (p.dim() - 1))
                right = right + (0.1 if maximize else -0.1) * g / root
                optimizer.step()
            assert_accurate(p.detach(), right, scale=3)
            assert_accurate(optimizer.state[p]["sum"], total, ulps=16)


def test_the_references_are_the_dense_formulas() -> None:
    """On a gradient that names every row, Adagrad's sparse step is the dense one; SGD's always is."""
    p, q = (table(torch.float64, (4, 3)).detach() for _ in range(2))
    s, t = torch.full((4, 3), 0.5, dtype=torch.float64), torch.full((4, 3), 0.5, dtype=torch.float64)
    indices, rows = torch.tensor([3, 1, 0, 2, 1]), torch.randn(5, 3, dtype=torch.float64)
    dense = torch.zeros(4, 3, dtype=torch.float64).index_add(0, indices, rows)
    reference.sparse_adagrad_step(p, indices, rows, s, 2.0, 0.1, 0.3, 1e-3, True, 0.5)
    reference.adagrad_step([q], [dense], [t], [2.0], 0.1, 0.3, 0.0, 1e-3, True, 0.5)
    torch.testing.assert_close((p, s), (q, t))
    reference.sparse_sgd_step(p, indices, rows, 0.1, False, 2.0)
    reference.sgd_step([q], [dense], [], [1.0], 0.1, 0.0, 0.0, 0.0, False, False, 2.0)
    torch.testing.assert_close(p, q)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 30), st.integers(0, 40), st.integers(0, 60)),
    name=st.sampled_from(list(TORCHS)),
    lr=st.floats(0.001, 1),
    maximize=st.booleans(),
)
def test_any_sizes(size: tuple[int, int, int], name: str, lr: float, maximize: bool) -> None:
    V, D, n = size

    def run(module: Any) -> list[Tensor]:
        p = table(torch.float64, (V, D))
        return train(getattr(module, name)([p], lr=lr, maximize=maximize), p, 3, n=n)

    # Sums of zero: torch divides by eps alone, which magnifies the rounding of the sum of duplicates.
    torch.testing.assert_close(run(optim), run(torch.optim), rtol=1e-7, atol=1e-9)


def test_a_row_that_most_of_the_batch_shares(backend: str) -> None:
    """Thousands of gradients of one row, in bfloat16: torch's sum of them stops growing at 256."""
    if backend == "torch":
        pytest.skip("torch's is wrong")
    n = 1300 if INTERPRETING else 10007
    p = torch.zeros(5, 19, dtype=torch.bfloat16, requires_grad=True)
    g = torch.Generator().manual_seed(1)
    indices = torch.where(torch.rand(n, generator=g) < 0.9, 3, torch.randint(0, 5, (n,), generator=g))
    rows = torch.rand(n, 19, generator=g).bfloat16()
    p.grad = torch.sparse_coo_tensor(indices[None], rows, p.shape, check_invariants=True)
    optim.SGD([p], lr=1.0).step()
    assert_accurate(
        -p.detach(), torch.zeros(5, 19, dtype=torch.float64).index_add(0, indices, rows.double()), ulps=0.51
    )


@needs_native
@pytest.mark.parametrize("name", ALL)
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    def run(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            p = table(torch.float32, (3000 if name != "Adagrad" else 5, 33))
            with llmkern.backend("native"):
                optimizer = getattr(optim, name)([p], lr=0.1, max_grad_norm=0.5)
                return [*train(optimizer, p, 2, n=20000), optimizer.grad_norm]
        finally:
            torch.set_num_threads(before)

    for one, many in zip(run(1), run(3), strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("name", TORCHS)
def test_a_state_dict_goes_both_ways(backend: str, name: str) -> None:
    options = TORCHS[name][0]
    p, alone = table(torch.float64, (9, 5)), table(torch.float64, (9, 5))
    want = train(getattr(torch.optim, name)([alone], **options), alone, 9)
    state: dict[str, Any] | None = None
    for i, module in enumerate((torch.optim, optim, torch.optim)):
        optimizer = getattr(module, name)([p], **(options if state is None else {"lr": 1.0}))
        if state is not None:
            optimizer.load_state_dict(state)
        got = train(optimizer, p, 3, first=3 * i)
        state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_a_state_dict_of_row_wise_adagrad() -> None:
    p, q = table(torch.bfloat16, (9, 5)), table(torch.bfloat16, (9, 5))
    first, whole = optim.RowWiseAdagrad([p], lr=0.1), optim.RowWiseAdagrad([q], lr=0.1)
    train(first, p, 2)
    second = optim.RowWiseAdagrad([p])
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    got, want = train(second, p, 2, first=2), train(whole, q, 4)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got[1].dtype == torch.float32


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_and_unscaling_inside_the_step(backend: str, name: str, max_norm: float) -> None:
    """Against the same step on gradients that were scaled before."""
    if backend == "torch":
        pytest.skip("torch's steps fold nothing")
    p, q = table(torch.float64, (9, 5)), table(torch.float64, (9, 5))
    ours, right = (getattr(optim, name)([x], lr=0.1, **more) for x, more in ((p, {"max_grad_norm": max_norm}), (q, {})))
    for step in range(3):
        draw(p, step, scale=8)
        draw(q, step)
        ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        norm = torch.nn.utils.get_total_norm([q.grad.to_dense()])
        q.grad._values().mul_(min(1.0, max_norm / (norm.item() + 1e-6)))
        ours.step()
        right.step()
        torch.testing.assert_close(ours.grad_norm, norm)
        torch.testing.assert_close(p.grad._values(), q.grad._values())
    torch.testing.assert_close(values(ours, p), values(right, q), rtol=1e-11, atol=1e-12)
    before = values(ours, p)
    ours.found_inf = torch.tensor(1.0)
    draw(p, 3, scale=float("inf"))
    ours.step()
    assert all(torch.equal(a, b) for a, b in zip(values(ours, p), before, strict=True))


@pytest.mark.parametrize("name", TORCHS)
def test_a_training_loop(backend: str, name: str) -> None:
    """Embedding(sparse=True), GradScaler, a schedule and a closure, as torch does it."""

    def run(module: Any) -> list[Tensor]:
        torch.manual_seed(0)
        layer = torch.nn.Embedding(20, 6, sparse=True, dtype=torch.float64)
        optimizer = getattr(module, name)(layer.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale(layer(torch.tensor([3, 1, 3, 0])).square().sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = layer(torch.tensor([3, 5, 19])).square().sum()
            loss.backward()
            return loss

        return [optimizer.step(closure).detach(), *values(optimizer, layer.weight)]

    torch.testing.assert_close(run(optim), run(torch.optim), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["SparseAdam", "LazyAdam", "Adagrad"])
def test_states_of_narrow_tables_in_fp32(backend: str, name: str) -> None:
    if backend == "torch":
        pytest.skip("torch has no such option")
    p, q = table(torch.bfloat16, (9, 5)), table(torch.bfloat16, (9, 5)).detach().float().requires_grad_()
    ours = getattr(optim, name)([p], state_dtype=torch.float32)
    right = getattr(torch.optim, "Adagrad" if name == "Adagrad" else "SparseAdam")([q])
    got, want = train(ours, p, 3), train(right, q, 3, rounded_to=torch.bfloat16)
    for state, w in zip(got[1:], want[1:], strict=True):
        assert state.dtype == torch.float32
        torch.testing.assert_close(state, w)


def test_nan_stays_in_its_element(backend: str) -> None:
    p = table(torch.float32, (6, 5))
    start = p.detach().clone()
    optimizer = optim.Adagrad([p])
    draw(p, 0)
    p.grad = p.grad.coalesce()
    p.grad._values()[1, 2] = float("nan")
    row = int(p.grad._indices()[0, 1])
    optimizer.step()
    assert p.isnan().nonzero().tolist() == [[row, 2]]
    assert torch.equal(p[5], start[5])


def test_what_no_kernel_serves_is_torchs_own_step() -> None:
    def run(module: Any, case: str) -> tuple[Tensor, Any]:
        if case == "momentum":
            p = table(torch.float32, (6, 5))
            optimizer = module.SGD([p], lr=0.1, momentum=0.5)
            draw(p, 0)
        elif case == "several sparse dimensions":
            p = table(torch.float32, (6, 5))
            optimizer = module.Adagrad([p], lr=0.1)
            p.grad = table(torch.float32, (6, 5)).detach().to_sparse()
        else:
            p = table(torch.float32, (5, 6)).detach().t().requires_grad_()
            optimizer = module.SparseAdam([p])
            draw(p, 0)
        choice = llmkern.explain(optimizer.step)
        optimizer.step()
        return p.detach(), choice

    for case in ("momentum", "several sparse dimensions", "non-contiguous tensors"):
        (got, choice), (want, _) = run(optim, case), run(torch.optim, case)
        assert torch.equal(got, want)
        assert choice.backends == ("torch",)
        if NATIVE:
            assert case in str(choice)


def test_errors() -> None:
    p = table(torch.float32, (6, 5))
    before = p.detach().clone()
    p.grad = torch.ones(6, 5)
    for module in (optim, torch.optim):
        with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
            module.SparseAdam([p]).step()
    with pytest.raises(RuntimeError, match="RowWiseAdagrad does not support dense gradients"):
        optim.RowWiseAdagrad([p]).step()
    draw(p, 0)
    messages = []
    for module in (optim, torch.optim):
        with pytest.raises(RuntimeError, match="weight_decay") as error:
            module.Adagrad([p], weight_decay=0.1).step()
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    # Nobody checks the indices of a sparse tensor that was made without: nothing is written.
    for bad in (6, -1):
        p.grad = torch.sparse_coo_tensor([[0, bad]], torch.ones(2, 5), (6, 5), check_invariants=False)
        for optimizer in (optim.SGD([p], lr=1.0), optim.RowWiseAdagrad([p]), optim.LazyAdam([p])):
            with pytest.raises(IndexError, match="out of range"):
                optimizer.step()
    assert torch.equal(p, before)
    with pytest.raises(ValueError, match="Invalid lr: -1"):
        optim.RowWiseAdagrad([p], lr=-1)


# Of a table, indices and values: each kernel's step with a state of its own, and what it steps.
STEPS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "sparse_sgd_step": (0, (0.1, False, 0.5)),
    "sparse_adagrad_step": (1, (3.0, 0.1, 0.2, 1e-3, True, 0.5)),
    "sparse_adam_step": (2, (3.0, 0.1, 0.9, 0.99, 1e-3, False, 0.5)),
    "rowwise_adagrad_step": (1, (0.1, 1e-3, False, 0.5)),
}


def states_of(name: str, p: Tensor) -> list[Tensor]:
    like = p[:, 0] if name == "rowwise_adagrad_step" else p
    return [torch.full_like(like, 0.5) for _ in range(STEPS[name][0])]


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", STEPS)
def test_wide_rows_and_long_runs(kernel: str, name: str) -> None:
    """Columns around a block of Triton's, and runs around its chunks, in fp64 against the reference; twice the same."""
    for D in (513, 4097) if INTERPRETING else (511, 512, 513, 4097):
        indices = torch.tensor([4] * 129 + [2] * 128 + [0, 5, 0]).repeat(2 if D == 513 else 1)
        indices = indices if D < 4097 else torch.tensor([1] * 12 + [2, 1, 4])
        indices = indices[torch.randperm(len(indices))].int()
        rows = torch.randn(len(indices), D, dtype=torch.float64)

        def run(library: Any, D: int = D, indices: Tensor = indices, rows: Tensor = rows) -> list[Tensor]:
            p = torch.full((6, D), 2.0, dtype=torch.float64)
            states = states_of(name, p)
            getattr(library, name)(p, indices, rows, *states, *STEPS[name][1])
            return [p, *states]

        got, again, want = run(dispatch.load(kernel)), run(dispatch.load(kernel)), run(reference)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert all(map(torch.equal, got, again))
        norm = dispatch.load(kernel).sparse_grad_norm(indices, rows, 6)
        torch.testing.assert_close(norm, reference.sparse_grad_norm(indices, rows, 6), rtol=1e-13, atol=0)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", STEPS)
def test_an_index_out_of_range_changes_nothing(kernel: str, name: str) -> None:
    for bad in (6, -1, 2**40):
        p, rows = torch.ones(6, 5), torch.ones(3, 5)
        states = states_of(name, p)
        with pytest.raises(IndexError, match="out of range"):
            getattr(dispatch.load(kernel), name)(p, torch.tensor([0, bad, 2]), rows, *states, *STEPS[name][1])
        assert (p == 1).all()
        assert all((state == 0.5).all() for state in states)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernels_refuse_what_does_not_fit_together(kernel: str) -> None:
    steps = dispatch.load(kernel)
    p, indices, rows, states = torch.zeros(6, 5), torch.tensor([0, 1]), torch.ones(2, 5), torch.zeros(6, 5)
    for bad in (
        (p[0], indices, rows, states),
        (p, indices[:1], rows, states),
        (p, indices, rows[:, :4].contiguous(), states),
        (p, indices, rows.double(), states),
        (p, indices.float(), rows, states),
        (p, indices, rows, states[:5]),
        (p, indices, rows, states.double()),
        (p, indices, rows.t().contiguous().t(), states),
    ):
        with pytest.raises(ValueError, match="expected"):
            steps.sparse_adagrad_step(*bad, 1.0, 0.1, 0.0, 1e-3, False, 1.0)
    with pytest.raises(ValueError, match="a number for each row"):
        steps.rowwise_adagrad_step(p, indices, rows, states, 0.1, 1e-3, False, 1.0)
    assert not p.any()
