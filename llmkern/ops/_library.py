"""How an op gets its name: ``llmkern::<op>_<phase>(..., str backend)``.

The implementation is the function of that name in the backend's namespace. Ops carry no autograd of their own: they
are called inside the ``autograd.Function`` of their file, which supplies every derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import dispatch

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


def define(schema: str, fake: Callable[..., Any], to_backend: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Defines ``llmkern::<schema>``, with one argument more at its end, ``str backend``; and ``llmkern_cpu::<schema>``,
    which the native library implements.

    ``fake(*args)`` gives empty results of the right shapes, without the backend. ``to_backend(*args)`` gives the
    arguments of a backend's function, where they are not the op's: a tensor ``drawn`` is no argument there. An overload
    has its op's implementation. Returns the callable op.
    """
    name, _, signature = schema.partition("(")
    function, _, overload = name.partition(".")

    def run(*args: Any) -> Any:
        *arguments, backend = args
        if to_backend is not None:
            arguments = to_backend(*arguments)
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
        torch.library.register_fake(f"llmkern::{name}", lambda *args: fake(*args[:-1]), lib=_library)
        if not overload:
            # Sizes are numbers where memory is read.
            _native.define(schema.replace("SymInt", "int").replace(", Tensor? drawn", ""))
    return getattr(getattr(torch.ops.llmkern, function), overload or "default")


def define_scaled(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`define` of a step with a ``float grad_scale``, which may also be given as a scalar tensor: one on a GPU
    goes to the kernels as it is, and nothing waits for its value."""
    by_number = define(schema, fake)
    by_tensor = define(schema.replace("(", ".Tensor(", 1).replace("float grad_scale", "Tensor grad_scale"), fake)

    def run(*args: Any) -> Any:
        # Where no other tensor stands.
        scaled = any(isinstance(arg, torch.Tensor) for arg in args[-3:])
        return (by_tensor if scaled else by_number)(*args)

    return run
