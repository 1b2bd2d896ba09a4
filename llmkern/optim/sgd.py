"""``SGD`` and ``Adagrad``: torch's own steps, until a kernel serves them; :func:`llmkern.explain` says so."""

from __future__ import annotations

from typing import Any

import torch.optim

from .. import dispatch


class _Picked(torch.optim.Optimizer):
    """Asks dispatch for ``_op`` once a group, where torch's step collects the group's tensors."""

    _op: str

    def _init_group(self, group: Any, params: Any, *lists: Any) -> Any:
        result = super()._init_group(group, params, *lists)  # type: ignore[misc]
        if params:
            dispatch.pick(self._op, params[0])
        return result


class SGD(_Picked, torch.optim.SGD):
    """Stochastic gradient descent; see :class:`torch.optim.SGD`."""

    _op = "sgd"


class Adagrad(_Picked, torch.optim.Adagrad):
    """Adagrad; see :class:`torch.optim.Adagrad`."""

    _op = "adagrad"
