"""How an op gets its name: ``llmkern::<op>_<phase>(..., str backend)``.

The implementation is the function of that name in the backend's namespace. Ops carry no autograd of their own: they
are called inside the ``autograd.Function`` of their file, which supplies every derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import dispatch
from .._groups import GROUPS, schema_of

# torch's registry takes a name once in a process. What is defined is kept beside it, so that llmkern may be imported
# again (after its modules were purged from `sys.modules`), and so that nothing is undone when an earlier copy goes.
_registry: dict[str, Any] = vars(torch.ops.llmkern)
_schemas: dict[str, str] = _registry.setdefault("_schemas", {})
if "_library" not in _registry:
    _registry["_library"] = torch.library.Library("llmkern", "DEF")
    # Beside it the native library defines what has no op: it is a part of another op, or a short way around it.
    _registry["_native"] = torch.library.Library("llmkern_cpu", "FRAGMENT")
_library: torch.library.Library = _registry["_library"]
_native: torch.library.Library = _registry["_native"]


# What `define` has returned, by name.
OPS: dict[str, Callable[..., Any]] = {}


def define(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines ``llmkern::<schema>``, with one argument more at its end, ``str backend``; and ``llmkern_cpu::<schema>``,
    which the native library implements.

    ``schema`` may name a group of ``_groups.py`` among its arguments: an op takes the group's members one by one, a
    function of a backend in Python takes the group. ``fake(*args)``, which takes groups too, gives empty results of the
    right shapes, without the backend. An overload has its op's implementation. Returns the callable op.
    """
    schema, in_groups = _expand(schema)
    name, _, signature = schema.partition("(")
    function, _, overload = name.partition(".")

    def run(*args: Any) -> Any:
        *arguments, backend = args
        if backend != "native":
            arguments = [*in_groups(arguments)]
        implementation = getattr(dispatch.load(backend), function)
        if not torch._C._is_any_autocast_enabled():
            return implementation(*arguments)
        # What autocast changes is functional's business: torch's products inside a kernel are meant as they are.
        with torch._C._DisableAutocast():
            return implementation(*arguments)

    if _schemas.setdefault(name, schema) != schema:
        raise RuntimeError(
            f"llmkern::{name}: got a second version of llmkern in this process, with another schema than the first, but"
            " torch keeps the ops of the first until the process ends; restart Python"
        )
    if not hasattr(getattr(torch.ops.llmkern, function, None), overload or "default"):
        arguments, results = signature.rsplit(") -> ", 1)
        _library.define(
            f"{name}({arguments}, str backend) -> {results}",
            tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
        )
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"llmkern::{name}", lambda *args: fake(*in_groups(args[:-1])), lib=_library)
        if not overload:
            # Sizes are numbers where memory is read.
            _native.define(schema.replace("SymInt", "int"))
    op = getattr(getattr(torch.ops.llmkern, function), overload or "default")
    OPS[name] = _short(op, function)
    return OPS[name]


def _short(op: Callable[..., Any], function: str) -> Callable[..., Any]:
    """``op``, or the native library's own ``function`` where nobody would notice: the way from torch's dispatcher
    through Python takes as long as a small kernel."""

    def call(*args: Any) -> Any:
        if args[-1] != "native" or _noticed():
            return op(*args)
        return getattr(dispatch.load("native"), function)(*args[:-1])

    return call


def _noticed() -> bool:
    """Whether somebody looks at ops, or at what they do: a compiler, a transform, a mode, a trace, autocast."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
        or torch._C._is_any_autocast_enabled()
    )


def _expand(schema: str) -> tuple[str, Callable[[Sequence[Any]], Sequence[Any]]]:
    """The schema with the members of its groups, and what puts arguments that come one by one into groups."""
    name, _, rest = schema.partition("(")
    arguments, results = rest.rsplit(") -> ", 1)
    parts = arguments.split(", ")
    if not any(part in GROUPS for part in parts):
        return schema, lambda args: args
    groups = [GROUPS.get(part) for part in parts]
    flat = ", ".join(schema_of(part) if part in GROUPS else part for part in parts)

    def in_groups(args: Sequence[Any]) -> Sequence[Any]:
        result, at = [], 0
        for group in groups:
            size = 1 if group is None else len(group._fields)
            result.append(args[at] if group is None else group(*args[at : at + size]))
            at += size
        return result

    return f"{name}({flat}) -> {results}", in_groups


def define_step(schema: str, fake: Callable[..., Any] = lambda *_: None) -> Callable[..., Any]:
    """:func:`define` of an optimizer's step, to be called without grad: it writes to the tensors that its schema marks.

    Its ``float grad_scale`` may also be a scalar tensor: one on a GPU goes to the kernels as it is, and nothing waits
    for its value. Gradients are written to unless ``after``, if there is one, is ``"keep"``.
    """
    by_number = define(schema, fake)
    by_tensor = define(schema.replace("(", ".Tensor(", 1).replace("float grad_scale", "Tensor grad_scale"), fake)
    arguments = getattr(torch.ops.llmkern, schema.partition("(")[0]).default._schema.arguments
    places = {argument.name: i for i, argument in enumerate(arguments)}
    written = [i for i, argument in enumerate(arguments) if argument.is_write]
    scale, after = places["grad_scale"], places.get("after")

    def run(*args: Any) -> Any:
        result = (by_tensor if isinstance(args[scale], torch.Tensor) else by_number)(*args)
        # A kernel writes behind autograd's back: a graph that still needs the old values must notice.
        kept = after is not None and args[after] == "keep"
        for i in written:
            if not (kept and i == places["grads"]):
                torch.autograd.graph.increment_version(args[i])
        return result

    return run
