"""torch's own samples of modules, for every class that ``llmkern.nn`` replaces: what ours does is what torch's does.

The samples and malformed calls are those of ``torch.testing._internal.common_modules``. ``EmbeddingBag`` and
``Dropout`` have none there: theirs are made of the functions' samples.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
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
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import llmkern.nn as nn

DOUBLE, SINGLE, HALF = torch.float64, torch.float32, torch.bfloat16
INFOS = {
    name: info
    for info in module_db
    if (name := info.module_cls.__name__) in nn.__all__ and info.module_cls is getattr(torch.nn, name)
}
NAMES = [*INFOS, "EmbeddingBag", "Dropout"]
# The most samples that are called in other dtypes, compiled, and differentiated numerically.
CALLED, COMPILED, CHECKED = 24, 3, 2


@dataclass(frozen=True, eq=False)
class Sample:
    """A construction and a call."""

    build: tuple[Any, ...]
    options: dict[str, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool
    words: str

    def module(self, cls: Any, dtype: torch.dtype) -> torch.nn.Module:
        torch.manual_seed(7)
        module = cls(*cast(self.build, dtype), **cast(self.options, dtype)).train(self.training)
        return module.to(dtype)

    def rounded(self, dtype: torch.dtype) -> Sample:
        parts = (cast(part, dtype) for part in (self.build, self.options, self.args, self.kwargs))
        return Sample(*parts, self.training, self.words)  # type: ignore[call-arg]

    def __str__(self) -> str:
        return f"{self.words} {self.build} {self.options} training={self.training}"


def classes(name: str) -> tuple[type, type]:
    return getattr(nn, name), getattr(torch.nn, name)


def _of_functions(name: str) -> Iterator[Sample]:
    """Modules out of the samples of functions."""
    (info,) = (op for op in op_db if op.name == {"EmbeddingBag": "nn.functional.embedding_bag"}.get(
        name, "nn.functional.dropout"))  # fmt: skip
    for sample in info.sample_inputs("cpu", DOUBLE, requires_grad=True):
        kwargs = dict(sample.kwargs)
        if name == "Dropout":
            training = kwargs.pop("training", True)
            yield Sample((), kwargs, (sample.input,), {}, training, "dropout")
            continue
        call = {key: kwargs.pop(key) for key in ("offsets", "per_sample_weights") if key in kwargs}
        yield Sample(tuple(sample.input.shape), kwargs, sample.args, call, True, "bags")


@cache
def samples(name: str) -> list[Sample]:
    if name not in INFOS:
        torch.manual_seed(0)
        return list(_of_functions(name))
    found, info = [], INFOS[name]
    # Of these, torch's samples do not depend on it.
    for training in (True, False) if name in ("RNN", "GRU", "LSTM") else (True,):
        torch.manual_seed(0)
        for sample in info.module_inputs_func(info, "cpu", DOUBLE, True, training):
            build, call = sample.constructor_input, sample.forward_input
            found.append(Sample(build.args, build.kwargs, call.args, call.kwargs, training, sample.desc))
    return found


def few(name: str, at_most: int) -> list[Sample]:
    def key(sample: Sample) -> Any:
        tensors = [(tuple(t.shape)[:0], t.dim(), t.dtype) for t in leaves((sample.args, sample.kwargs))]
        return sample.build, mapped(sample.options, lambda t: t.dim()), tensors, sample.training  # type: ignore[arg-type,return-value]

    return distinct(samples(name), key, at_most)


def _draws(name: str, sample: Sample) -> bool:
    """Whether the result depends on random numbers: the masks of dropout are ours."""
    return name == "Dropout" and sample.training and 0 < sample.options.get("p", 0.5) < 1


def _seen(module: Any, sample: Sample, dtype: torch.dtype, form: Callable[[Any], Any], second: bool = True) -> Any:
    args, kwargs = (form(cast(value, dtype)) for value in (sample.args, sample.kwargs))
    torch.manual_seed(3)
    return observe(module, args, kwargs, module.parameters(), second)


def torchs(sample: Sample) -> Sample:
    """The call to compare with: torch's chunked loss has no second derivatives, or wrong ones."""
    return replace(sample, options={**sample.options, "options": None}) if "options" in sample.options else sample


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "form"), [(DOUBLE, fresh), (SINGLE, apart), (HALF, fresh)], ids=["double", "apart", "half"]
)
def test_every_sample(name: str, dtype: torch.dtype, form: Callable[[Any], Any]) -> None:
    ours, theirs = classes(name)
    chosen = few(name, CALLED)
    for sample in samples(name) if dtype == DOUBLE else chosen:
        # torch has no second derivatives of bags; test_second_derivatives checks ours.
        second = dtype == DOUBLE and name != "EmbeddingBag" and sample in chosen
        got = _seen(sample.module(ours, dtype), sample, dtype, form, second)
        if _draws(name, sample):
            got.numbers.clear()
        other = torchs(sample) if second else sample
        want = _seen(other.module(theirs, dtype), other, dtype, form, second)
        assert_works(want, sample)
        exact = None
        if dtype != DOUBLE:
            module = torchs(sample).module(theirs, dtype).to(DOUBLE)
            exact = _seen(module, sample.rounded(dtype), DOUBLE, form, second)
        assert_alike(got, want, sample, exact)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name: str) -> None:
    for sample in few(name, CHECKED):
        module = sample.module(classes(name)[0], DOUBLE)
        args, kwargs = fresh(sample.args), fresh(sample.kwargs)
        moving = [t for t in (*leaves((args, kwargs)), *module.parameters()) if t.requires_grad]

        def call(*_: Tensor, module: Any = module, args: Any = args, kwargs: Any = kwargs) -> Any:
            torch.manual_seed(3)
            return tuple(t for t in leaves(module(*args, **kwargs)) if t.requires_grad)

        if sample.options.get("sparse"):
            continue
        assert torch.autograd.gradcheck(call, moving, fast_mode=True), sample
        assert torch.autograd.gradgradcheck(call, moving, fast_mode=True, atol=1e-4), sample


@pytest.mark.parametrize("name", NAMES)
def test_compiled_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    # Of those that only call a function, the function is compiled with more of its samples.
    thin = not name.startswith(("LSTM", "GRU", "RNN"))
    for sample in few(name, 1 if thin else COMPILED):
        ours, theirs = classes(name)
        module = sample.module(ours, DOUBLE)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        got = _seen(compiled, sample, DOUBLE, fresh, second=False)
        want = _seen(torchs(sample).module(theirs, DOUBLE), torchs(sample), DOUBLE, fresh, second=False)
        assert_compiled_alike(got, want, sample, draws=_draws(name, sample))


@pytest.mark.parametrize("name", [name for name, info in INFOS.items() if info.module_error_inputs_func])
def test_malformed_calls_raise_torchs_errors(name: str) -> None:
    count = 0
    for training in (True, False):
        torch.manual_seed(0)
        for case in INFOS[name].module_error_inputs_func(INFOS[name], "cpu", SINGLE, True, training):
            build, call = case.module_error_input.constructor_input, case.module_error_input.forward_input

            def run(cls: Any, build: Any = build, call: Any = call, training: bool = training) -> Any:
                module = cls(*build.args, **build.kwargs).train(training)
                return None if call is None else module(*fresh(call.args), **fresh(call.kwargs))

            got, want = (observe(run, (cls,)) for cls in classes(name))
            assert "error" in want.facts
            assert_alike(got, want, f"{build} {call}")
            count += 1
    assert count


@pytest.mark.parametrize("name", NAMES)
def test_on_the_meta_device(name: str) -> None:
    for sample in few(name, CHECKED):
        args, kwargs = (mapped(v, lambda t: t.detach().to("meta").requires_grad_(t.requires_grad)) for v in (
            sample.args, sample.kwargs))  # fmt: skip
        if any(type(a).__name__ == "PackedSequence" for a in sample.args):
            continue
        seen = []
        for cls in classes(name):
            module = sample.module(cls, DOUBLE).to("meta")
            seen.append(observe(module, args, kwargs, module.parameters(), second=False))
        assert_alike(*seen, sample)


def _ways(module: torch.nn.Module, cls: Any, sample: Sample) -> Iterator[tuple[str, torch.nn.Module]]:
    yield "deepcopy", copy.deepcopy(module)
    yield "pickle", pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    yield "torch.save", torch.load(file, weights_only=False)
    other = sample.module(cls, DOUBLE)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(module.state_dict())
    yield "state_dict", other
    yield "float and back", copy.deepcopy(module).half().double()
    yield "train and eval", copy.deepcopy(module).eval().train().eval()
    yield "meta and back", _emptied(module)
    yield "share_memory", copy.deepcopy(module).share_memory()
    yield "frozen", copy.deepcopy(module).requires_grad_(False)


def _emptied(module: torch.nn.Module) -> torch.nn.Module:
    empty = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    empty.load_state_dict(module.state_dict())
    return empty


@pytest.mark.parametrize("name", NAMES)
def test_copies_work_as_torchs_copies_do(name: str) -> None:
    for sample in few(name, 2):
        ours, theirs = ({way: _seen(m, sample, DOUBLE, fresh, second=False) for way, m in _ways(
            torchs(sample).module(cls, DOUBLE), cls, torchs(sample))} for cls in classes(name))  # fmt: skip
        for way in theirs:
            if _draws(name, sample):
                ours[way].numbers.clear()
            assert_works(theirs[way], (way, sample))
            assert_alike(ours[way], theirs[way], (way, sample))


@pytest.mark.parametrize("name", NAMES)
def test_hooks_see_what_torchs_hooks_see(name: str) -> None:
    for sample in few(name, 2):
        heard: dict[Any, list[Any]] = {}
        for cls in classes(name):
            module, calls = torchs(sample).module(cls, DOUBLE), heard.setdefault(cls, [])

            def note(kind: str, calls: list[Any] = calls) -> Callable[..., None]:
                return lambda module, *given: calls.append((kind, [
                    (tuple(t.shape), t.dtype, t.requires_grad) for t in leaves(given)]))  # fmt: skip

            module.register_forward_pre_hook(note("before"))
            module.register_forward_hook(note("after"), with_kwargs=True)
            module.register_full_backward_pre_hook(note("backward before"))
            module.register_full_backward_hook(note("backward after"))
            out = module(*fresh(sample.args), **fresh(sample.kwargs))
            sum(t.sum() for t in leaves(out) if t.requires_grad).backward()
        ours, theirs = heard.values()
        assert ours == theirs, sample
        assert len(theirs) >= 3
