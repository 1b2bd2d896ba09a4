"""What a call does, as far as its caller can see, so that ours can be compared with torch's.

``observe`` makes a call, differentiates it twice and writes down: values, dtypes, strides, ``requires_grad``, which
tensors share memory, versions of what went in, warnings, or an error's type and text. ``differences`` compares two
observations: facts exactly, numbers by the rule of the house, against a third one in fp64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

# What torch's C++ says, it says once in a process. And where torch's chunked loss ignores its options, ours has them.
UNHEARD = ("Triggered internally", "linear_cross_entropy: ``options`` ignored")


def leaves(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, dicts and packed sequences, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor replaced; a named tuple keeps its class."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(inner, function) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(inner, function) for inner in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(inner, function) for inner in value)
    return value


def fresh(value: Any) -> Any:
    """The same with memory of its own: leaves of autograd with the same strides, one where it was one."""
    made: dict[int, Tensor] = {}

    def copied(t: Tensor) -> Tensor:
        if id(t) not in made:
            new = torch.empty(0, dtype=t.dtype)
            new.set_(t.detach().untyped_storage().clone(), t.storage_offset(), t.shape, t.stride())
            made[id(t)] = new.requires_grad_(t.requires_grad)
        return made[id(t)]

    return mapped(value, copied)


def apart(value: Any) -> Any:
    """The same values in every second place of memory, as torch's own tests make tensors non-contiguous."""

    def spread(t: Tensor) -> Tensor:
        if t.dim() == 0 or t.numel() < 2:
            return fresh(t)
        wide = torch.stack([t.detach(), torch.zeros_like(t)], -1).flatten(-2)
        return wide[..., ::2].requires_grad_(t.requires_grad)

    if isinstance(value, PackedSequence):
        return value._replace(data=spread(value.data))
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(map(apart, value))
    return mapped(value, spread)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The same with floating tensors, and dtypes among the arguments, of another dtype."""
    if isinstance(value, torch.dtype):
        return dtype if value.is_floating_point else value
    if isinstance(value, dict):
        return {key: cast(inner, dtype) for key, inner in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(cast(inner, dtype) for inner in value)

    def one(t: Tensor) -> Tensor:
        return t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t

    return mapped(value, one)


@dataclass
class Observation:
    """``numbers`` are compared up to rounding, ``facts`` exactly."""

    numbers: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, prefix: str, tensors: Sequence[Tensor | None]) -> None:
        for i, t in enumerate(tensors):
            name = f"{prefix}[{i}]"
            self.facts[name] = None if t is None else (_layout(t), t.requires_grad)
            if t is not None and not t.is_meta:
                self.numbers[name] = t.detach().to_dense() if t.is_sparse else t.detach().clone()


def _layout(t: Tensor) -> tuple[Any, ...]:
    if t.layout != torch.strided:
        return t.layout, tuple(t.shape), t.dtype
    # The stride of a dimension of one element says nothing.
    strides = [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] if t.numel() else []
    return tuple(t.shape), strides, t.dtype, t.device.type


def _contiguous(layout: tuple[Any, ...]) -> tuple[Any, ...]:
    return _layout(torch.empty(layout[0], dtype=layout[2], device=layout[3])) if len(layout) == 4 else layout


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata if t.layout == torch.strided and t.numel() else 0


def observe(
    function: Callable[..., Any], args: Any = (), kwargs: Any = None, parameters: Any = (), second: bool = True
) -> Observation:
    """The call ``function(*args, **kwargs)``, its gradients, and with ``second`` the gradients of these."""
    seen = Observation()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _observe(seen, function, args, kwargs or {}, list(parameters), second)
        except Exception as error:
            seen.facts["error"] = (type(error), str(error))
    texts = {(w.category, str(w.message)) for w in caught}
    seen.facts["warnings"] = sorted((w for w in texts if not any(mark in w[1] for mark in UNHEARD)), key=str)
    return seen


def _observe(
    seen: Observation, function: Callable[..., Any], args: Any, kwargs: Any, parameters: list[Tensor], second: bool
) -> None:
    inputs = [*leaves(args), *leaves(kwargs)]
    versions = [t._version for t in (*inputs, *parameters)]
    result = function(*args, **kwargs)
    outputs = list(leaves(result))
    seen.facts["type"] = type(result)
    seen.facts["versions"] = [t._version - v for t, v in zip((*inputs, *parameters), versions, strict=True)]
    owners = [_memory(t) for t in (*inputs, *parameters)]
    seen.facts["shares memory with"] = [[i for i, o in enumerate(owners) if o and o == _memory(t)] for t in outputs]
    seen.facts["outputs share"] = [[i for i, o in enumerate(outputs) if _memory(o) == _memory(t)] for t in outputs]
    seen.facts["has a grad_fn"] = [t.grad_fn is not None for t in outputs]
    seen.write("output", outputs)
    sources = [t for t in (*inputs, *parameters) if t.requires_grad]
    ends = [t for t in outputs if t.requires_grad]
    if not sources or not ends:
        return
    g = torch.Generator().manual_seed(0)
    directions = [torch.randn(t.shape, generator=g, dtype=torch.double) for t in (*ends, *sources)]
    cotangents = [d.to(t) if not t.is_meta else d.to("meta", t.dtype) for d, t in zip(directions, ends, strict=False)]
    grads = torch.autograd.grad(ends, sources, cotangents, retain_graph=second, allow_unused=True)
    seen.write("gradient", grads)
    if not second or any(t is not None and (t.is_sparse or t.is_meta) for t in grads):
        return
    moving = [c.requires_grad_() for c in cotangents]
    grads = torch.autograd.grad(ends, sources, moving, create_graph=True, allow_unused=True)
    seen.facts["gradients have a graph"] = [t is not None and t.requires_grad for t in grads]
    along = [(t, d.to(t.dtype)) for t, d in zip(grads, directions[len(ends) :], strict=True) if t is not None]
    along = [(t, d) for t, d in along if t.requires_grad]
    if along:
        ends, directions = map(list, zip(*along, strict=True))
        grads = torch.autograd.grad(ends, [*sources, *moving], directions, allow_unused=True)
        # None and zeros are the same second derivative.
        for i, (t, source) in enumerate(zip(grads, (*sources, *moving), strict=True)):
            seen.numbers[f"second derivative[{i}]"] = torch.zeros_like(source) if t is None else t.detach()


def differences(ours: Observation, theirs: Observation, exact: Observation | None = None) -> list[str]:
    """What differs, in words. A number may be off by twice what torch's is off from ``exact``, and by some rounding."""
    found = []
    for name in {**theirs.facts, **ours.facts}:
        got, own = ours.facts.get(name), theirs.facts.get(name)
        # torch's products may give transposed gradients; contiguous ones are as good.
        usual = name.startswith("gradient[") and got and own and got == (_contiguous(own[0]), own[1])
        if got != own and not usual:
            found.append(f"{name}: {got!r}, torch: {own!r}")
    for name in theirs.numbers.keys() & ours.numbers.keys():
        got, own = ours.numbers[name], theirs.numbers[name]
        right = own if exact is None else exact.numbers[name]
        if got.shape != own.shape:
            continue
        if not own.is_floating_point():
            found += [f"{name}: other integers"] * (not torch.equal(got, own))
            continue
        got, own, right = (t.double() for t in (got, own, right))
        finite = torch.isfinite(own) & torch.isfinite(right)
        if not torch.equal(got[~finite].nan_to_num(), own[~finite].nan_to_num()):
            found.append(f"{name}: other NaN or infinities")
        got, own, right = (t[finite] for t in (got, own, right))
        if got.numel():
            largest = max(1.0, float(right.abs().max()))
            bound = 2 * float((own - right).abs().max()) + 32 * torch.finfo(theirs.numbers[name].dtype).eps * largest
            error = float((got - right).abs().max())
            found += [f"{name}: off by {error:.3g}, torch by {float((own - right).abs().max()):.3g}"] * (error > bound)
    return found


def assert_alike(ours: Observation, theirs: Observation, where: Any, exact: Observation | None = None) -> None:
    __tracebackhide__ = True
    if found := differences(ours, theirs, exact):
        pytest.fail(f"{where}:\n" + "\n".join(found))


def assert_works(seen: Observation, where: Any) -> None:
    """torch's samples are calls that torch serves: an error in both would be a comparison of nothing."""
    __tracebackhide__ = True
    if "error" in seen.facts:
        pytest.fail(f"{where}: {seen.facts['error']}")


def assert_compiled_alike(ours: Observation, theirs: Observation, where: Any, draws: bool) -> None:
    """As compiled code can be: it writes its outputs where it likes, and may draw other numbers (``draws``)."""
    assert_works(ours, where)
    if draws:
        ours.numbers.clear()
    for seen in (ours, theirs):
        for fact in ("shares memory with", "outputs share", "has a grad_fn", "warnings"):
            seen.facts.pop(fact)
    assert_alike(ours, theirs, where)


def distinct(samples: Sequence[Any], key: Callable[[Any], Any], at_most: int) -> list[Any]:
    """Samples that differ in ``key``, the first of each; evenly chosen ones where there are more than ``at_most``."""
    firsts = list({str(key(sample)): sample for sample in reversed(samples)}.values())[::-1]
    if len(firsts) <= at_most:
        return firsts
    return [firsts[i * len(firsts) // at_most] for i in range(at_most)]
