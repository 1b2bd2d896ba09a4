"""Recurrent layers: few units, which one program has; several programs for the whole sequence; one launch a step."""

from __future__ import annotations

from typing import Any

import torch

from kernel_cases import Case
from llmkern import kernels
from llmkern._facts import CELLS, GATES, SAVED_GATES
from llmkern._groups import RNNCotangents, RNNInputs, RNNOptions, RNNSaved


def _layer(
    device: torch.device, mode: str, dtype: torch.dtype, T: int, B: int, I: int, H: int, heads: int
) -> tuple[RNNInputs, RNNOptions]:
    G, C = GATES[mode], CELLS[mode]
    x, hx, weight_ih, weight_hh, bias_ih, bias_hh = (
        torch.zeros(shape, dtype=dtype, device=device)
        for shape in ((T, B, I), (B, H), (G * H, I), (G * H, H // heads), (G * H,), (G * H,))
    )
    cx = torch.zeros(B, C * H, dtype=dtype, device=device) if C else None
    return RNNInputs(x, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh), RNNOptions(mode)


def forward(device: torch.device, **sizes: Any) -> None:
    kernels.rnn_forward(*_layer(device, **sizes), True)


def backward(device: torch.device, **sizes: Any) -> None:
    inputs, options = _layer(device, **sizes)
    x, hx, cx, H = inputs.x, inputs.hx, inputs.cx, sizes["H"]
    shape, saved = x.shape[:2], SAVED_GATES[options.mode]
    y, gates = x.new_zeros(*shape, H), x.new_zeros((*shape, saved * H) if saved else 0)
    cells = x.new_zeros((*shape, cx.shape[1]) if cx is not None else 0, dtype=torch.float32)
    cotangents, kept = RNNCotangents(torch.zeros_like(y), hx, cx, None), RNNSaved(y, gates, cells, x.new_zeros(0))
    kernels.rnn_backward(cotangents, inputs, kept, options, True, True, True)


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
