"""torch's own samples of functions (``OpInfo``), for every function that ``llmkern.functional`` replaces."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from conformance import (
    apart,
    assert_alike,
    assert_compiled_alike,
    assert_works,
    cast,
    distinct,
    fresh,
    leaves,
    mapped,
    observe,
)
from torch.testing._internal.common_methods_invocations import op_db

import llmkern.functional as F

DOUBLE, SINGLE, HALF = torch.float64, torch.float32, torch.bfloat16
INFOS = {
    f"{name}.{info.variant_test_name}".rstrip("."): info
    for info in op_db
    if (name := info.name.removeprefix("nn.functional.")) in F.__all__ and info.name.startswith("nn.functional.")
}
CALLED, COMPILED = 24, 3


def functions(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Ours and torch's, with the arguments in OpInfo's order, which for a lookup is the table first."""
    ours, theirs = (getattr(f, name.partition(".")[0]) for f in (F, TF))
    if name == "embedding":
        return lambda w, i, **kwargs: ours(i, w, **kwargs), lambda w, i, **kwargs: theirs(i, w, **kwargs)
    if name == "embedding_bag":
        return lambda w, *args, **kwargs: ours(args[0], w, *args[1:], **kwargs), lambda w, *args, **kwargs: theirs(
            args[0], w, *args[1:], **kwargs
        )
    return ours, theirs


@cache
def samples(name: str) -> list[Any]:
    torch.manual_seed(0)
    return list(INFOS[name].sample_inputs("cpu", DOUBLE, requires_grad=True))


def few(name: str, at_most: int) -> list[Any]:
    def key(sample: Any) -> Any:
        tensors = [(t.dim(), t.dtype, t.numel() == 0) for t in leaves((sample.input, sample.args, sample.kwargs))]
        return tensors, mapped(sample.kwargs, lambda t: t.new_empty(0))

    return distinct(samples(name), key, at_most)


def _seen(function: Any, sample: Any, dtype: torch.dtype, form: Callable[[Any], Any], second: bool) -> Any:
    args, kwargs = (form(cast(value, dtype)) for value in ((sample.input, *sample.args), sample.kwargs))
    torch.manual_seed(3)
    return observe(function, args, kwargs, second=second)


def _draws(name: str, sample: Any) -> bool:
    """Whether the result depends on random numbers: the masks of dropout are ours."""
    return name == "dropout" and sample.kwargs.get("training", True) and 0 < sample.kwargs.get("p", 0.5) < 1


def test_every_function_of_torch_has_its_samples() -> None:
    of_torch = {name for name in F.__all__ if hasattr(TF, name)}
    assert of_torch == {name.partition(".")[0] for name in INFOS}


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.parametrize(
    ("dtype", "form"), [(DOUBLE, fresh), (SINGLE, apart), (HALF, fresh)], ids=["double", "apart", "half"]
)
def test_every_sample(name: str, dtype: torch.dtype, form: Callable[[Any], Any]) -> None:
    ours, theirs = functions(name)
    # torch has no second derivatives of bags and of chunks; ours are checked with the modules.
    second = dtype == DOUBLE and name != "embedding_bag" and "chunked" not in name
    for sample in samples(name) if dtype == DOUBLE else few(name, CALLED):
        got, want = (_seen(function, sample, dtype, form, second) for function in (ours, theirs))
        assert_works(want, sample)
        exact = None
        if _draws(name, sample):
            got.numbers.clear()
        elif dtype != DOUBLE:
            exact = _seen(theirs, _rounded(sample, dtype), DOUBLE, form, second)
        assert_alike(got, want, sample, exact)


def _rounded(sample: Any, dtype: torch.dtype) -> Any:
    parts = {name: cast(cast(getattr(sample, name), dtype), DOUBLE) for name in ("input", "args", "kwargs")}
    return SimpleNamespace(**parts)


@pytest.mark.parametrize("name", [name for name in INFOS if "chunked" not in name])
def test_compiled_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    ours, theirs = functions(name)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for sample in few(name, COMPILED):
        got = _seen(compiled, sample, DOUBLE, fresh, second=False)
        want = _seen(theirs, sample, DOUBLE, fresh, second=False)
        assert_compiled_alike(got, want, sample, draws=_draws(name, sample))


@pytest.mark.parametrize("name", [name for name, info in INFOS.items() if info.error_inputs_func])
def test_malformed_calls_raise_torchs_errors(name: str) -> None:
    cases = list(INFOS[name].error_inputs("cpu"))
    assert cases
    for case in cases:
        got, want = (_seen(function, case.sample_input, SINGLE, fresh, False) for function in functions(name))
        assert "error" in want.facts, case
        # Two batch dimensions are no error of ours.
        if "dimensionality 1 or 2, got 3" in want.facts["error"][1]:
            continue
        assert_alike(got, want, case)


@pytest.mark.parametrize("name", INFOS)
def test_on_the_meta_device(name: str) -> None:
    for sample in few(name, COMPILED):
        seen = []
        for function in functions(name):
            args, kwargs = (
                mapped(value, lambda t: t.detach().to("meta").requires_grad_(t.requires_grad))
                for value in ((sample.input, *sample.args), sample.kwargs)
            )
            seen.append(observe(function, args, kwargs, second=False))
        assert_alike(*seen, sample)
