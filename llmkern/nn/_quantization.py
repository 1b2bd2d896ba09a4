"""``torch.ao.quantization`` converts our layers as it converts torch's.

It looks layers up by their exact class, in dictionaries and in assertions of ``from_float``, so that entries for ours
in its mappings would not do. All its ways (dynamic, static, quantisation-aware training; eager and FX) mark the layers
that they will convert in ``propagate_qconfig_``. Layers of ours that were marked become torch's there: the same object,
with its parameters and hooks, in torch's class; so do those that ``fuse_modules`` fetches. That is done when a model is
quantised, and to nothing else.
"""

from __future__ import annotations

import sys
import warnings
from functools import wraps
from typing import Any

import torch
import torch.ao.quantization


def convert_ours(replaced: dict[type, type]) -> None:
    """``replaced``: torch's classes, and ours in their places."""
    _convert_marked(replaced)
    _convert_fused(replaced)


def _convert_fused(replaced: dict[type, type]) -> None:
    """``fuse_modules`` looks up the classes of the layers that it is told to make one of."""
    home: Any = sys.modules.get("torch.ao.quantization.fuse_modules")
    get = getattr(home, "_get_module", None)
    if get is None:
        return

    @wraps(get)
    def _get_module(*args: Any) -> Any:
        layer = get(*args)
        _become_torch(layer, replaced)
        return layer

    home._get_module = _get_module


def _convert_marked(replaced: dict[type, type]) -> None:
    # Its attribute of this name is a function.
    quantize: Any = sys.modules.get("torch.ao.quantization.quantize")
    propagate = getattr(quantize, "propagate_qconfig_", None)
    if propagate is None:
        # A torch whose quantisation is elsewhere.
        return

    @wraps(propagate)
    def propagate_qconfig_(module: torch.nn.Module, qconfig_dict: Any = None, *args: Any, **kwargs: Any) -> None:
        spec = dict(qconfig_dict or {})
        for theirs, ours in replaced.items():
            # Either name means both, as in `isinstance`.
            given = [spec[cls] for cls in (theirs, ours) if cls in spec]
            if given:
                spec.setdefault(theirs, given[0])
                spec.setdefault(ours, given[0])
        propagate(module, spec, *args, **kwargs)
        for layer in module.modules():
            if getattr(layer, "qconfig", None) is not None:
                _become_torch(layer, replaced)

    # What was loaded before has a name of its own for it.
    for name, home in list(sys.modules.items()):
        if name.startswith("torch.ao.") and vars(home).get("propagate_qconfig_") is propagate:
            vars(home)["propagate_qconfig_"] = propagate_qconfig_


def _become_torch(layer: torch.nn.Module, replaced: dict[type, type]) -> None:
    theirs: Any = next((theirs for theirs, ours in replaced.items() if type(layer) is ours), None)
    if theirs is None or not _is_convertible(theirs):
        return
    # Ours shows options that torch does not have.
    if layer.extra_repr() == theirs.extra_repr(layer):
        layer.__class__ = theirs
    else:
        warnings.warn(
            f"torch.ao.quantization: got {layer}, with options that {theirs.__name__} of torch does not have; it stays"
            " as it is",
            stacklevel=4,
        )


def _is_convertible(theirs: type) -> bool:
    mappings: Any = torch.ao.quantization.quantization_mappings
    kinds = ("DYNAMIC_QUANT", "STATIC_QUANT", "QAT")
    return any(theirs in getattr(mappings, f"DEFAULT_{kind}_MODULE_MAPPINGS", ()) for kind in kinds)
