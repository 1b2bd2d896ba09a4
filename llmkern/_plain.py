"""Which tensors a kernel can be given, and when: one rule for all ops.

A kernel reads memory: it is given plain strided tensors, eagerly, under autograd, under the compiler, or under
``torch.func``. Everything else has a meaning that lies elsewhere (a subclass that knows aten's ops only, a nested or
sparse tensor, a graph that is being traced), and takes torch's own function.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from ._graphs import constant_while_compiling, exporter

# Of their shape nothing can be asked.
NESTED = ["nested tensors"]
# How `torch.func` may be used where no kernel serves. What torch cannot transform at all, the reference can.
TRANSFORMS = (
    "a transform in compiled code",
    "forward mode inside forward mode",
    "torch.func.functionalize",
    "a graph that is being traced",
)


def not_plain(*tensors: Tensor | None) -> list[str]:
    """What keeps kernels from a call with these tensors, whatever their dtypes, named as an option that no kernel
    has; mostly nothing."""
    compiling = torch.compiler.is_compiling()
    if torch._C._are_functorch_transforms_active() and (use := _transform(compiling)) is not None:
        return [use]
    if not compiling and torch._C._len_torch_dispatch_stack() and _is_traced():
        return [TRANSFORMS[3]]
    for t in tensors:
        if t is None:
            continue
        kind = type(t)
        if kind is not Tensor and kind is not Parameter:
            if not issubclass(kind, Tensor):
                return ["arguments that are not tensors"]
            # An exporter's fake tensors stand for plain ones: the choice of a backend knows of the graph.
            exported = kind.__name__ == "FakeTensor" and exporter() is not None
            if not t.is_nested and not exported and (compiling or _knows_aten_only(kind)):
                return [f"tensors of class {kind.__name__}"]
        if t.is_nested:
            return NESTED
        if t.layout is not torch.strided:
            return ["tensors that are not strided"]
    return []


def _knows_aten_only(kind: type[Tensor]) -> bool:
    """Whether what a class does is told by ``__torch_dispatch__``. Other subclasses have memory like any tensor, and so
    have tables with row gradients, whose ``__torch_dispatch__`` hands it to every op."""
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not getattr(kind, "gives_memory", False)


def _transform(compiling: bool) -> str | None:
    # The compiler has an autograd.Function differentiate itself, but not be mapped or differentiated in forward mode.
    if compiling:
        return TRANSFORMS[0]
    levels = [level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()]
    # The `jvp` of an autograd.Function runs with forward mode off: the outer derivative would be lost.
    if levels.count("Jvp") > 1:
        return TRANSFORMS[1]
    return TRANSFORMS[2] if "Functionalize" in levels else None


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor is; torch knows no autocast of the meta device, and raises."""
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


@constant_while_compiling
def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether torch hands a dense LSTM whose input is of this dtype to oneDNN, as a whole, under autocast too."""
    if not (torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def mapped() -> bool:
    """Whether vmap is at work, which has no better rule for a kernel than one call for each element."""
    if not torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return False
    return any(level.key().name == "Vmap" for level in torch._C._functorch.get_interpreter_stack() or ())


def _is_traced() -> bool:
    """Whether ``make_fx`` traces: its graph would keep what a kernel decides by looking at values."""
    key = torch._C._TorchDispatchModeKey.PROXY
    return torch._C._get_dispatch_mode(key) is not None
