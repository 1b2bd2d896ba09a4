"""What Triton's interpreter gets wrong, put right.

It keeps bfloat16 as bits, truncates where a GPU rounds to the nearest even, and multiplies the bits as integers in a
dot: here its conversions are torch's. And up to Triton 3.6 it cannot take a loop's bound from a tensor with NumPy 2.4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype


def _to_torch(handle: Any) -> torch.Tensor:
    data = np.ascontiguousarray(handle.data)
    if handle.dtype.scalar == tl.bfloat16:
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)


def _cast(self: Any, source: Any, type_: Any) -> Any:
    """Any conversion; those to and from bfloat16 go by fp32, as a GPU's do."""
    from_, to = source.dtype.scalar, type_.scalar
    if from_ != tl.bfloat16 and to != tl.bfloat16:
        return _original_cast(self, source, type_)
    wide = _to_torch(source).to(torch.float32).reshape(source.data.shape)
    if to != tl.bfloat16:
        return TensorHandle(wide.numpy().astype(_get_np_dtype(type_)), to)
    return TensorHandle(wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16), to)


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    wide = [_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
    return _original_dot(self, *wide, *rest)


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _original_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_original_patch = interpreter._patch_lang_tensor
_original_cast, _original_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def install() -> None:
    """Puts these right, in this process."""
    interpreter._patch_lang_tensor = _patch_tensor
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = _cast, _dot
