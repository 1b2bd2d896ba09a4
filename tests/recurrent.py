"""Recurrent layers with any option, their inputs, and all that a call gives: shared by the tests of options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import llmkern
import llmkern.nn as nn


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in tensors(part)]


def run(module: Any, x: Any, states: Any, backend: str) -> list[Tensor]:
    """All outputs, and all gradients for random cotangents on every output; random options draw the same."""
    torch.manual_seed(11)
    with llmkern.backend(backend):
        data = x.data if isinstance(x, PackedSequence) else x
        data = data.detach().clone().requires_grad_()
        given = [s.detach().clone().requires_grad_() for s in tensors(states)]
        states = tuple(given) if isinstance(states, tuple) else given[0]
        outputs = tensors(module(x._replace(data=data) if isinstance(x, PackedSequence) else data, states))
        g = torch.Generator().manual_seed(5)
        cotangents = [torch.randn(out.shape, generator=g).to(out.dtype) for out in outputs]
        grads = torch.autograd.grad(outputs, [data, *given, *module.parameters()], cotangents)
    return [t.detach() for t in outputs] + list(grads)


def build(name: str, *args: Any, **options: Any) -> Any:
    """With weights of norms that are not the identity."""
    torch.manual_seed(3)
    module = getattr(nn, name)(*args, **options)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "_norm_" in key:
                parameter += torch.randn_like(parameter) / 2
    return module


def inputs(name: str, B: int, shape: str, dtype: torch.dtype, H: int = 18, layers: int = 1) -> tuple[Any, Any]:
    g = torch.Generator().manual_seed(7)
    x = torch.randn((B, 6, 5) if shape == "batch_first" else (6, B, 5), generator=g).to(dtype)
    states = [torch.randn(layers, B, H, generator=g).to(dtype) for _ in range(2 if "LSTM" in name else 1)]
    lengths = torch.linspace(6, 1, B).long()
    packed = pack_padded_sequence(x, lengths) if shape == "packed" else x
    if name == "sLSTM":
        return packed, _slstm_states(states)
    return packed, tuple(states) if name == "LSTM" else states[0]


def _slstm_states(states: Any) -> Any:
    """c, n > 0, m."""
    h, c = states
    return h, torch.cat([c, c.abs() + 0.5, c.cos()], -1)
