"""Peers with CUDA kernels under torch's interface, measured where they are installed: each replaces the functions that
it has, and the case's own code runs over them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import bench_rnn
from .peers import AbsentError, TorchShaped
from .suite import Call, Run, namespace


def _liger() -> dict[str, Callable[..., Any]]:
    from liger_kernel.ops import LigerEmbeddingFunction
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_fused_linear_cross_entropy

    def embedding(indices: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return LigerEmbeddingFunction.apply(weight, indices)

    return {
        "cross_entropy": liger_cross_entropy,
        "linear_cross_entropy": liger_fused_linear_cross_entropy,
        "embedding": embedding,
    }


def _cut_cross_entropy() -> dict[str, Callable[..., Any]]:
    from cut_cross_entropy import linear_cross_entropy

    # Its default leaves small gradients out; the numbers are to match.
    return {"linear_cross_entropy": lambda x, weight, target: linear_cross_entropy(x, weight, target, filter_eps=None)}


def _quack() -> dict[str, Callable[..., Any]]:
    from quack import cross_entropy
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return {"cross_entropy": cross_entropy, "linear_cross_entropy": chunked_linear_cross_entropy}


_FUNCTIONS = {"liger-kernel": _liger, "cut-cross-entropy": _cut_cross_entropy, "quack": _quack}


class Peer(TorchShaped):
    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__("torch", **(_FUNCTIONS[name]() if name in _FUNCTIONS else {}))

    def setup(self, run: Run, device: str) -> Call:
        sizes = run.case.sizes
        if self.name == "flashrnn":
            return _flashrnn(run, device)
        if sizes.get("variant") == "soft" or (self.name == "quack" and sizes.get("variant") == "smoothing"):
            raise AbsentError(f"has no {sizes['variant']} targets")
        if run.case.problem == "embedding":
            self.ns.nn = _Modules(self.ns.functional.embedding)
        return super().setup(run, device)


class _Modules:
    """torch.nn with another Embedding."""

    def __init__(self, embedding: Callable[..., Any]) -> None:
        class Embedding(torch.nn.Embedding):
            def forward(self, indices: torch.Tensor) -> torch.Tensor:
                return embedding(indices, self.weight)

        self.Embedding = Embedding


def _flashrnn(run: Run, device: str) -> Call:
    """One layer, one direction; the product with the inputs is torch's, as its authors use it."""
    from flashrnn import flashrnn

    sizes, train = run.case.sizes, run.phase != "forward"
    T, B, H, kind = (sizes[key] for key in ("T", "B", "H", "kind"))
    if sizes["variant"] or sizes["layers"] > 1 or run.dtype == "fp32":
        raise AbsentError("measured in bf16 and fp16, one layer, dense, one direction")
    if kind == "GRU":
        raise AbsentError("its GRU has other biases than torch's")
    module, x, dy = bench_rnn.draw(namespace("torch"), sizes, run.place(device))
    names = dict(module.named_parameters())
    gates, function = bench_rnn.GATES[kind], {"LSTM": "lstm", "RNN": "elman"}[kind]
    # (gates, heads, out, in), with one head.
    R = names["weight_hh_l0"].detach().view(gates, 1, H, H).requires_grad_(train)
    W = names["weight_ih_l0"].detach().requires_grad_(train)
    bias = (names["bias_ih_l0"] + names["bias_hh_l0"]).detach().view(gates, 1, H).requires_grad_(train)
    # It has the batch first.
    x, dy = x.transpose(0, 1).contiguous().requires_grad_(train), dy.transpose(0, 1).contiguous()
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[run.dtype]

    def call() -> dict[str, Any]:
        with torch.set_grad_enabled(train):
            Wx = torch.nn.functional.linear(x, W).view(B, T, gates, 1, H)
            y = flashrnn(Wx, R, bias, function=function, backend="cuda_fused", dtype=dtype)[0][0].reshape(B, T, H)
        if not train:
            return {"y": y.transpose(0, 1)}
        for leaf in (x, W, R, bias):
            leaf.grad = None
        y.backward(dy)
        assert x.grad is not None
        return {"y": y.transpose(0, 1), "dx": x.grad.transpose(0, 1)}

    return call
