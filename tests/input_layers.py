"""Input layers of transformers: their operands, and what is right for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmkern
import llmkern.functional as LF

# The input layers of models that people train; all but the vocabulary are small.
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gpt2": {"P": 9},
    "bert": {"P": 12, "K": 2, "norm": "layer", "affine": True, "eps": 1e-12, "padding_idx": 0},
    "transformer": {"P": 9, "scale": 4.0, "padding_idx": -1},
    "rms": {"norm": "rms", "affine": True, "scale": 0.5},
    "bare norm": {"K": 3, "norm": "layer", "scale_grad_by_freq": True},
}


def operands(model: str, dtype: torch.dtype, V: int = 11, D: int = 37) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The floating operands by name, and the options. 37 columns: vectors and a tail."""
    options = dict(MODELS[model])
    sizes = {"weight": (V, D)}
    for name, rows in (("position_weight", options.pop("P", None)), ("token_type_weight", options.pop("K", None))):
        if rows is not None:
            sizes[name] = (rows, D)
    if options.pop("affine", False):
        sizes["norm_weight"] = sizes["norm_bias"] = (D,)
    return {name: torch.randn(shape).to(dtype) for name, shape in sizes.items()}, options


def composed(input: Tensor, weight: Tensor, **keywords: Any) -> Tensor:
    """By torch's functions, in the operands' dtype."""
    with llmkern.backend("torch"):
        return LF.fused_embedding(input, weight, **keywords)


def exact(input: Tensor, tensors: dict[str, Tensor], **keywords: Any) -> Tensor:
    """By torch's functions in fp64, step by step and without any of ours. ``keep``: the mask of the dropout."""
    t = {name: value.double() for name, value in tensors.items()}
    padding, by_freq = keywords.get("padding_idx"), keywords.get("scale_grad_by_freq", False)
    x = F.embedding(input, t["weight"], padding, scale_grad_by_freq=by_freq) * keywords.get("scale", 1.0)
    if "position_weight" in t:
        positions = keywords.get("positions")
        x = x + t["position_weight"][torch.arange(input.shape[-1]) if positions is None else positions.long()]
    if "token_type_weight" in t:
        types = keywords.get("token_types")
        x = x + t["token_type_weight"][torch.zeros_like(input) if types is None else types.long()]
    eps = keywords.get("eps", 1e-5)
    if keywords.get("norm") == "layer":
        x = F.layer_norm(x, x.shape[-1:], t.get("norm_weight"), t.get("norm_bias"), eps)
    elif keywords.get("norm") == "rms":
        x = F.rms_norm(x, x.shape[-1:], t.get("norm_weight"), eps) + t.get("norm_bias", 0)
    if "keep" in keywords:
        x = torch.where(keywords["keep"], x / (1 - keywords["dropout"]), 0)
    return x


def run(function: Any, dout: Tensor, tensors: dict[str, Tensor], *args: Any, **keywords: Any) -> tuple[Tensor, ...]:
    """The output and the gradients of all operands."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    out = function(*args, **leaves, **keywords)
    return out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))


def run_exact(dout: Tensor, tensors: dict[str, Tensor], input: Tensor, **keywords: Any) -> tuple[Tensor, ...]:
    return run(lambda **leaves: exact(input, leaves, **keywords), dout, {n: t.double() for n, t in tensors.items()})
