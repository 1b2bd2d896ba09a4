"""Optimizers: every backend against torch's in fp64, for every option; the formulas; what the kernels refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import FLOATS, assert_accurate, kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import OPTIONS, compare, draw, parameters, train, values
from torch import Tensor

import llmkern
from llmkern import dispatch, optim, reference

OP = "adam"
KERNELS = kernels(OP)
NATIVE = dispatch.unavailable("native") is None
needs_native = pytest.mark.skipif(not NATIVE, reason="the native library is not built")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(backend: str, name: str, dtype: torch.dtype) -> None:
    for options in OPTIONS[name]:
        # In float16 the defaults of 1e-8 and less are 0, and torch's own step 0 / 0 where a square vanishes.
        small = {"eps": 1e-3} if dtype == torch.float16 and name != "SGD" else {}
        compare(name, dtype, **(small | options))


@pytest.mark.parametrize("name", OPTIONS)
def test_many_steps(name: str) -> None:
    """Errors of single steps do not add up to more than torch's do."""
    compare(name, torch.float32, steps=60, **OPTIONS[name][1])


@needs_native
@pytest.mark.parametrize("options", OPTIONS["SGD"])
def test_sgd_is_torchs_to_the_last_bit(options: dict[str, Any]) -> None:
    """Where neither rounds in between. The others take a square root, which torch's vectors do not round correctly."""
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    got = train(optim.SGD(ours, **options), ours, 4)
    want = train(torch.optim.SGD(theirs, **options, foreach=False), theirs, 4)
    if "avx" in torch.backends.cpu.get_cpu_capability().lower():
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=5).map(tuple)
UNIT = st.floats(0, 0.999)


def _agree(name: str, shapes: Any, options: dict[str, Any]) -> None:
    """With torch in fp64, where both orders of operation agree to rounding."""
    ours, theirs = parameters(torch.float64, shapes), parameters(torch.float64, shapes)
    with llmkern.backend("native" if NATIVE else "reference"):
        got = train(getattr(optim, name)(ours, **options), ours, 3)
    want = train(getattr(torch.optim, name)(theirs, **options), theirs, 3)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(
    shapes=SHAPES,
    lr=st.floats(0, 1),
    betas=st.tuples(UNIT, UNIT),
    decay=st.floats(0, 1),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_numbers_adam(shapes: Any, lr: float, betas: Any, decay: float, flags: Any) -> None:
    decoupled, amsgrad, maximize = flags
    options = {"lr": lr, "betas": betas, "weight_decay": decay, "amsgrad": amsgrad, "maximize": maximize}
    _agree("AdamW" if decoupled else "Adam", shapes, options)


@settings(max_examples=25, deadline=None)
@given(shapes=SHAPES, lr=st.floats(0, 1), momentum=UNIT, dampening=UNIT, decay=UNIT, maximize=st.booleans())
def test_any_numbers_sgd(
    shapes: Any, lr: float, momentum: float, dampening: float, decay: float, maximize: bool
) -> None:
    options = {"lr": lr, "momentum": momentum, "weight_decay": decay, "maximize": maximize}
    _agree("SGD", shapes, options | {"dampening": dampening})
    _agree("SGD", shapes, options | {"nesterov": momentum > 0})


@settings(max_examples=25, deadline=None)
@given(shapes=SHAPES, lr=st.floats(0, 1), decays=st.tuples(UNIT, UNIT), start=UNIT, maximize=st.booleans())
def test_any_numbers_adagrad(shapes: Any, lr: float, decays: Any, start: float, maximize: bool) -> None:
    options = {"lr": lr, "lr_decay": decays[0], "weight_decay": decays[1], "maximize": maximize}
    _agree("Adagrad", shapes, options | {"initial_accumulator_value": start})


@needs_native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_number_of_threads_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    def run(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            params = parameters(dtype)
            with llmkern.backend("native"):
                return train(getattr(optim, name)(params, lr=0.1, max_grad_norm=1.0), params, 2)
        finally:
            torch.set_num_threads(before)

    for one, many in zip(run(1), run(3), strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("name", OPTIONS)
def test_states_of_narrow_parameters_in_fp32(backend: str, name: str) -> None:
    """The error of a state is that of fp32; the parameter is rounded once a step."""
    if backend == "torch":
        pytest.skip("torch has no such option")
    options = {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}
    if name == "Adagrad":
        # Which bfloat16 would round.
        options["initial_accumulator_value"] = 0.1

    for dtype in (torch.bfloat16, torch.float16):
        ours, wide = parameters(dtype), parameters(torch.float32)
        optimizer = getattr(optim, name)(ours, state_dtype=torch.float32, **options)
        right = getattr(torch.optim, name)(wide, **options)
        for step in range(6):
            draw(ours, step, dtype)
            draw(wide, step, dtype)
            for p, w in zip(ours, wide, strict=True):
                w.data.copy_(p.data)
            optimizer.step()
            right.step()
        got, want = values(optimizer, ours), values(right, wide)
        for p, w in zip(got[: len(ours)], want, strict=False):
            assert p.dtype == dtype
            assert torch.equal(p, w.to(dtype)) or (p - w).abs().max() <= torch.finfo(dtype).eps * w.abs().max()
        for state, w in zip(got[len(ours) :], want[len(ours) :], strict=True):
            assert state.dtype == torch.float32
            torch.testing.assert_close(state, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_nan_and_infinity_come_through(backend: str, name: str) -> None:
    """As from torch: they poison their own element and no other."""
    grads = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 0.0, 1e-30])
    options = {"momentum": 0.9} if name == "SGD" else {}

    def run(module: Any) -> list[Tensor]:
        (p,) = parameters(torch.float32, ((6,),))
        optimizer = getattr(module, name)([p], lr=0.1, **options)
        for _ in range(2):
            p.grad = grads.clone()
            optimizer.step()
        return values(optimizer, [p])

    torch.testing.assert_close(run(optim), run(torch.optim), equal_nan=True)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernels_refuse_what_does_not_fit_together(kernel: str) -> None:
    last = (1.0, "keep")
    steps = {
        "adam_step": (4, (0.1, 0.9, 0.99, 1e-8, 0.0, False, False, *last)),
        "sgd_step": (3, (0.1, 0.9, 0.0, 0.0, False, False, *last)),
        "adagrad_step": (3, (0.1, 0.0, 0.0, 1e-8, False, *last)),
    }
    p, short, wide = torch.zeros(40), torch.zeros(39), torch.zeros(40, dtype=torch.float64)
    for name, (lists, numbers) in steps.items():

        def call(*tensors: Any, counts: Any = (1.0,), name: str = name, numbers: Any = numbers) -> None:
            maxima = [[]] if name == "adam_step" and len(tensors) == 4 else []
            getattr(dispatch.load(kernel), name)(*map(list, tensors), *maxima, list(counts), *numbers)

        good = [[p], [torch.ones(40)], *([torch.zeros(40)] for _ in range(lists - 2))]
        for bad in (short, wide, torch.zeros(80)[::2], torch.zeros(40, dtype=torch.complex64)):
            for place in range(1, lists):
                with pytest.raises(ValueError, match="expected"):
                    call(*good[:place], [bad], *good[place + 1 :])
            if name == "adam_step":
                with pytest.raises(ValueError, match="expected"):
                    call(*good, [bad])
        for place in range(1, lists):
            with pytest.raises(ValueError, match="as many"):
                call(*good[:place], good[place] * 2, *good[place + 1 :])
        with pytest.raises(ValueError, match="as many"):
            call(*good, counts=())
        with pytest.raises(ValueError, match="keep, zero or scale"):
            call(*good, numbers=(*numbers[:-1], "nothing"))
    assert not p.any()


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("after", ["keep", "zero", "scale"])
def test_one_call_for_tensors_of_many_kinds(kernel: str, after: str) -> None:
    """Dtypes, dtypes of states, steps and alignments that differ; the same bits as each tensor alone, and the numbers
    of the reference. The factor is a number or a tensor."""
    g = torch.Generator().manual_seed(5)

    def some(n: int, dtype: torch.dtype, shift: int) -> Tensor:
        """Not at the start of its memory."""
        return torch.rand(n + shift, generator=g).to(dtype)[shift:]

    fp32, bf16 = torch.float32, torch.bfloat16
    kinds = [
        (2050, fp32, fp32, 0),
        (1025, fp32, fp32, 1),
        (1024, bf16, fp32, 3),
        (9, bf16, bf16, 0),
        (0, fp32, fp32, 0),
    ]
    lists = [[some(n, dtype if k < 2 else wide, shift) for n, dtype, wide, shift in kinds] for k in range(4)]
    steps, numbers = [1.0, 7.0, 1.0, 3.0, 1.0], (0.1, 0.8, 0.9, 1e-6, 0.2, False, True)

    def run(library: Any, members: list[int], factor: Any) -> list[Tensor]:
        own = [
            [each[i].clone() if each[i].storage_offset() == 0 else shifted(each[i]) for i in members] for each in lists
        ]
        library.adam_step(*own, [], [steps[i] for i in members], *numbers, factor, after)
        return [t for each in own for t in each]

    def shifted(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(t.storage_offset()), t])[t.storage_offset() :]

    everyone = list(range(len(kinds)))
    got = run(dispatch.load(kernel), everyone, 0.3)
    for factor in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        alone = [run(dispatch.load(kernel), [i], factor) for i in everyone]
        assert all(map(torch.equal, got, [one[k] for k in range(4) for one in alone]))
    for a, b in zip(got, run(reference, everyone, 0.3), strict=True):
        assert_accurate(a, b.double(), ulps=2)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel == "triton"])
def test_a_step_is_one_launch_whatever_its_numbers(kernel: str) -> None:
    """Of as many blocks as all tensors have; a learning rate, a step or a factor compiles nothing."""
    from llmkern.kernels._launch import recording

    sizes = (2**33 + 1, 1024, 3)
    tensors = [torch.empty(n, device="meta") for n in sizes]
    seen = []
    for lr, step, factor in ((0.1, 1.0, 1.0), (0.2, 2.0, 0.5), (1.0, 1000.0, 0.0)):
        with recording() as launches:
            lists = [tensors, tensors, tensors, tensors]
            dispatch.load(kernel).adam_step(
                *lists, [], [step] * 3, lr, 0.9, 0.99, 1e-8, 0.0, True, False, factor, "keep"
            )
        (launch,) = launches
        assert launch.grid == (2**23 + 1 + 1 + 1,)
        kinds = [type(argument) for argument in launch.arguments]
        seen.append((launch.constexprs, kinds, [a.dtype for a in launch.arguments if isinstance(a, Tensor)]))
    assert seen[0] == seen[1] == seen[2]


def test_the_reference_of_adam_is_the_formula() -> None:
    """One element by hand: two steps of AdamW with amsgrad."""
    p, lr, b1, b2, eps, wd = 2.0, 0.1, 0.9, 0.99, 1e-8, 0.01
    m = v = top = 0.0
    x, avg, square, largest = (torch.tensor([value], dtype=torch.float64) for value in (p, 0, 0, 0))
    for t, g in ((1, 3.0), (2, -0.5)):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        top = max(top, v)
        p = p * (1 - lr * wd) - lr * (m / (1 - b1**t)) / ((top / (1 - b2**t)) ** 0.5 + eps)
        grad = torch.tensor([g], dtype=torch.float64)
        reference.adam_step([x], [grad], [avg], [square], [largest], [float(t)], lr, b1, b2, eps, wd, True, False)
        assert x.item() == pytest.approx(p, rel=1e-14)


def test_the_references_are_the_formulas() -> None:
    """One element by hand: two steps each of SGD with dampened momentum and of Adagrad."""
    p, buffer, lr, momentum, dampening, decay = 2.0, 0.0, 0.1, 0.9, 0.2, 0.01
    x, b = (torch.tensor([value], dtype=torch.float64) for value in (p, 0))
    for t, g in ((1, 3.0), (2, -0.5)):
        slope = -g + decay * p
        buffer = slope if t == 1 else momentum * buffer + (1 - dampening) * slope
        p -= lr * buffer
        grad = torch.tensor([2 * g], dtype=torch.float64)
        numbers = (lr, momentum, dampening, decay, False, True)
        reference.sgd_step([x], [grad], [b], [float(t)], *numbers, grad_scale=0.5, after="scale")
        assert x.item() == pytest.approx(p, rel=1e-14)
        assert grad.item() == g
    p, total, lr, lr_decay, decay, eps = 2.0, 0.3, 0.1, 0.5, 0.01, 1e-3
    x, s = (torch.tensor([value], dtype=torch.float64) for value in (p, total))
    for t, g in ((1, 3.0), (2, -0.5)):
        slope = g + decay * p
        total += slope**2
        p -= lr / (1 + (t - 1) * lr_decay) * slope / (total**0.5 + eps)
        grad = torch.tensor([g], dtype=torch.float64)
        reference.adagrad_step([x], [grad], [s], [float(t)], lr, lr_decay, decay, eps, False, after="zero")
        assert x.item() == pytest.approx(p, rel=1e-14)
        assert grad.item() == 0
