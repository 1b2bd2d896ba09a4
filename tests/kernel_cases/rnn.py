"""Recurrent layers: few units, which one program has; several programs for the whole sequence; one launch a step."""

from __future__ import annotations

from typing import Any

import torch

from kernel_cases import Case
from llmkern import kernels

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "slstm": 4}
_CELLS = {"lstm": 1, "slstm": 3}


def _layer(
    device: torch.device, mode: str, dtype: torch.dtype, T: int, B: int, I: int, H: int, heads: int
) -> tuple[Any, ...]:
    G, C = _GATES[mode], _CELLS.get(mode, 0)
    x, hx, weight_ih, weight_hh, bias_ih, bias_hh = (
        torch.zeros(shape, dtype=dtype, device=device)
        for shape in ((T, B, I), (B, H), (G * H, I), (G * H, H // heads), (G * H,), (G * H,))
    )
    cx = torch.zeros(B, C * H, dtype=dtype, device=device) if C else None
    options = (mode, False, False, 0.0, 0.0, 0.0, -1)
    return (x, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, None, None, None, None, *options)


def forward(device: torch.device, **sizes: Any) -> None:
    kernels.rnn_forward(*_layer(device, **sizes), True)


def backward(device: torch.device, **sizes: Any) -> None:
    layer = _layer(device, **sizes)
    x, hx, cx, mode, H = layer[0], layer[1], layer[2], sizes["mode"], sizes["H"]
    shape = x.shape[:2]
    saved = {"lstm": 4, "gru": 4, "slstm": 5}.get(mode, 0)
    y, gates = x.new_zeros(*shape, H), x.new_zeros((*shape, saved * H) if saved else 0)
    cells = x.new_zeros((*shape, cx.shape[1]) if cx is not None else 0, dtype=torch.float32)
    dy, saved_tensors = torch.zeros_like(y), (y, gates, cells, x.new_zeros(0))
    kernels.rnn_backward(dy, hx, cx, None, *layer[:11], *saved_tensors, *layer[11:], True, True, True)


def _forward_floor(mode: str, dtype: torch.dtype, T: int, B: int, I: int, H: int, heads: int) -> int:
    """Sums of x, gates, y, cells once; h out and back in; states in and out. W_hh and the biases count in each step:
    on a GPU they come from caches, which the interpreter has not."""
    n, tokens = dtype.itemsize, T * B
    return tokens * H * (4 * 4 + 4 * n + n + 4 + 2 * n) + T * 4 * H * (H + 2) * n + 4 * B * H * 4


def _backward_floor(mode: str, dtype: torch.dtype, T: int, B: int, I: int, H: int, heads: int) -> int:
    """dy, gates, c of a step and of the one before, dgates out and back in; states in and out; W_hh in each step. Then
    h before each step, which a product wants side by side."""
    n, tokens = dtype.itemsize, T * B
    return tokens * H * (n + 4 * n + 2 * 4 + 8 * n + 2 * n) + (T + 1) * 4 * H * H * n + 4 * B * H * 4


def _sizes(mode: str, dtype: torch.dtype, H: int, B: int = 64, heads: int = 1) -> dict[str, Any]:
    return {"mode": mode, "dtype": dtype, "T": 128, "B": B, "I": 256, "H": H, "heads": heads}


_LAYERS = {
    "lstm bfloat16": _sizes("lstm", torch.bfloat16, 128),
    "lstm float32": _sizes("lstm", torch.float32, 64),
    "lstm bfloat16, together": _sizes("lstm", torch.bfloat16, 1024),
    "lstm float32, together": _sizes("lstm", torch.float32, 512),
    "gru bfloat16, step by step": _sizes("gru", torch.bfloat16, 512, B=1024),
    "slstm bfloat16, heads": _sizes("slstm", torch.bfloat16, 1024, heads=4),
}
_SMALL = {"T": 4, "B": 16, "I": 8, "H": 32}
CASES = {
    f"{way.__name__} {name}": Case(way, sizes, {**sizes, **_SMALL}, floor)
    if sizes["mode"] == "lstm" and "together" not in name
    else Case(way, sizes)
    for way, floor in ((forward, _forward_floor), (backward, _backward_floor))
    for name, sizes in _LAYERS.items()
}
