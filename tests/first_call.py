"""What happens if a compiled, exported or transformed call is the first one of a process.

``python first_call.py`` forks once for each case from a process that has imported torch, its compiler and llmkern, and
called nothing of llmkern: so each child makes the first call. It prints a line of JSON for each case: what went wrong,
or null. ``test_first_call.py`` reads them.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import llmkern.functional as F
import llmkern.nn as nn
from llmkern import dispatch

IDS = torch.tensor([[1, 2, 0], [3, 4, 1]])
X, H = torch.linspace(-1, 1, 30).view(2, 3, 5), torch.linspace(-1, 1, 8).view(2, 4)
CLASSES = torch.tensor([1, 3])
STATE = torch.zeros(1, 3, 4)
GATE = {name: torch.linspace(-1, 1, 16 * n).view(16, n) for name, n in (("ih", 5), ("hh", 4))}


def _weights(gates: int) -> tuple[torch.Tensor, torch.Tensor]:
    return GATE["ih"][: 4 * gates], GATE["hh"][: 4 * gates]


def _layer(mode: str, gates: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    hx = {"lstm": (STATE, STATE.clone()), "slstm": (STATE, torch.zeros(1, 3, 12))}.get(mode, STATE)

    def run(x: torch.Tensor, hx: Any, *weights: torch.Tensor) -> Any:
        return getattr(F, mode)(x, hx, list(weights), False, 1, 0.0, False, False, False)

    return run, (X, hx, *_weights(gates))


def _cell(mode: str, gates: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    hx = (STATE[0], STATE[0].clone()) if mode == "lstm" else STATE[0]
    return getattr(F, f"{mode}_cell"), (X[0], hx, *_weights(gates))


def _clipped(parameter: torch.nn.Parameter) -> torch.Tensor:
    parameter.grad = parameter.detach() * 3
    return F.clip_grad_norm_([parameter], 1.0)


# Of everything in nn.__all__ and functional.__all__: something to call, and arguments. What is random is drawn with the
# probability 1.
MODULES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "CrossEntropyLoss": (nn.CrossEntropyLoss(z_loss=0.1), (H, CLASSES)),
    "Dropout": (nn.Dropout(1.0), (X,)),
    "Embedding": (nn.Embedding(5, 4, padding_idx=0), (IDS,)),
    "EmbeddingBag": (nn.EmbeddingBag(5, 4), (IDS,)),
    "FusedEmbedding": (nn.FusedEmbedding(5, 4096, norm="layer", num_positions=4), (IDS,)),
    "GRU": (nn.GRU(5, 4), (X,)),
    "GRUCell": (nn.GRUCell(5, 4), (X[0],)),
    "LSTM": (nn.LSTM(5, 4, 2, bidirectional=True, layer_norm=True), (X,)),
    "LSTMCell": (nn.LSTMCell(5, 4), (X[0], (STATE[0], STATE[0].clone()))),
    "LayerNorm": (nn.LayerNorm(1024), (torch.linspace(-1, 1, 1 << 20).view(1024, 1024),)),
    "Linear": (nn.Linear(512, 512), (torch.linspace(-1, 1, 16 * 512).view(16, 512),)),
    "LinearCrossEntropyLoss": (nn.LinearCrossEntropyLoss(4, 6), (H, CLASSES)),
    "MSELoss": (nn.MSELoss(), (X, X + 1)),
    "NLLLoss": (nn.NLLLoss(), (H, CLASSES)),
    "QuantizedEmbedding": (nn.QuantizedEmbedding(5, 4), (IDS,)),
    "RMSNorm": (nn.RMSNorm(1024), (torch.linspace(-1, 1, 1 << 20).view(1024, 1024),)),
    "RNN": (nn.RNN(5, 4), (X,)),
    "RNNCell": (nn.RNNCell(5, 4), (X[0],)),
    "sLSTM": (nn.sLSTM(5, 4), (X,)),
}
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "clip_grad_norm_": (_clipped, (torch.nn.Parameter(X.clone()),)),
    "cross_entropy": (F.cross_entropy, (H, CLASSES)),
    "dropout": (lambda x: F.dropout(x, 1.0), (X,)),
    "embedding": (F.embedding, (IDS, GATE["hh"])),
    "embedding_bag": (F.embedding_bag, (IDS, GATE["hh"])),
    "fused_embedding": (F.fused_embedding, (IDS, GATE["ih"].repeat(1, 4096))),
    "layer_norm": (F.layer_norm, (torch.linspace(-1, 1, 1 << 20).view(1024, 1024), (1024,))),
    "linear": (F.linear, (torch.ones(16, 512), torch.linspace(-1, 1, 512 * 512).view(512, 512))),
    "linear_cross_entropy": (F.linear_cross_entropy, (H, GATE["hh"], CLASSES)),
    "mse_loss": (F.mse_loss, (X, X + 1)),
    "nll_loss": (F.nll_loss, (H, CLASSES)),
    "rms_norm": (F.rms_norm, (torch.linspace(-1, 1, 1 << 20).view(1024, 1024), (1024,))),
    "quantize_rows": (F.quantize_rows, (H,)),
    "quantized_embedding": (F.quantized_embedding, (IDS, GATE["hh"].to(torch.uint8), torch.ones(16), torch.zeros(16))),
    **{mode: _layer(mode, n) for mode, n in (("lstm", 4), ("slstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1))},
    **{f"{mode}_cell": _cell(mode, n) for mode, n in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1))},
}


def _compiled(function: Callable[..., Any], args: tuple[Any, ...], **options: Any) -> Any:
    return torch.compile(function, backend="eager", fullgraph=True, **options)(*args)


def _forced(name: str) -> Callable[..., Any]:
    def run(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with dispatch.backend(name):
            return _compiled(function, args)

    return run


def _with_gradients(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    out = torch.compile(function, backend="aot_eager", fullgraph=True)(*args)
    tensors = [t for t in tree_leaves(out) if t.requires_grad]
    parameters = list(function.parameters())  # type: ignore[attr-defined]
    return out, torch.autograd.grad(sum(t.sum() for t in tensors), parameters)


def _vmapped(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    out = torch.func.vmap(function)(*(arg.unsqueeze(0) for arg in args))
    return torch.utils._pytree.tree_map(lambda t: t[0], out)


# Other first calls: (name of a module, what calls it).
WAYS: dict[str, tuple[str, Callable[..., Any]]] = {
    "compiled with gradients": ("LSTM", _with_gradients),
    "compiled with dynamic shapes": ("CrossEntropyLoss", lambda f, args: _compiled(f, args, dynamic=True)),
    "compiled, native forced": ("GRU", _forced("native")),
    "compiled, reference forced": ("Embedding", _forced("reference")),
    "compiled, torch forced": ("Linear", _forced("torch")),
    "exported": ("GRU", lambda f, args: torch.export.export(f, args, strict=False).module()(*args)),
    "exported strictly": ("Embedding", lambda f, args: torch.export.export(f, args, strict=True).module()(*args)),
    "traced": ("sLSTM", lambda f, args: torch.jit.trace(f, args, check_trace=False)(*args)),
    "made an fx graph": ("CrossEntropyLoss", lambda f, args: make_fx(lambda *a: f(*a))(*args)(*args)),
    "vmapped": ("GRU", _vmapped),
}
CASES = [*MODULES, *FUNCTIONS, *WAYS]


def call(name: str) -> None:
    if name in WAYS:
        module, way = WAYS[name]
        function, args = MODULES[module]
    else:
        function, args = (MODULES | FUNCTIONS)[name]
        way = _compiled
    got, eager = way(function, args), function(*args)
    if way is _with_gradients:
        parameters = list(function.parameters())  # type: ignore[attr-defined]
        eager = eager, torch.autograd.grad(sum(t.sum() for t in tree_leaves(eager)), parameters)
    torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-6)


def start(name: str) -> int:
    """A child that makes the call and prints its line."""
    if child := os.fork():
        return child
    trouble = None
    try:
        call(name)
    except BaseException:
        trouble = traceback.format_exc(limit=-3)
    os.write(1, (json.dumps([name, trouble]) + "\n").encode())
    os._exit(0)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # The compiler loads itself, so that not every child does. Nothing of llmkern is called.
    torch.compile(lambda x: (x @ x).relu(), backend="aot_eager", fullgraph=True)(X[0, :, :3])
    assert not any(f"llmkern.{name}" in sys.modules for name in ("native", "kernels"))
    waiting = list(CASES)
    running: set[int] = set()
    while waiting or running:
        while waiting and len(running) < 2:
            running.add(start(waiting.pop()))
        running.discard(os.wait()[0])


if __name__ == "__main__":
    main()
