"""``SGD`` and ``Adagrad``: torch's own steps, until a kernel serves them; :func:`llmkern.explain` says so."""

from __future__ import annotations

from typing import Any

import torch.optim

from .. import dispatch


class SGD(torch.optim.SGD):
    """Stochastic gradient descent; see :class:`torch.optim.SGD`."""

    def _init_group(self, group: Any, params: Any, grads: Any, *args: Any) -> Any:
        result = super()._init_group(group, params, grads, *args)
        if params:
            dispatch.pick("sgd", params[0])
        return result


class Adagrad(torch.optim.Adagrad):
    """Adagrad; see :class:`torch.optim.Adagrad`."""

    def _init_group(self, group: Any, params_with_grad: Any, grads: Any, *args: Any) -> Any:
        result = super()._init_group(group, params_with_grad, grads, *args)
        if params_with_grad:
            dispatch.pick("adagrad", params_with_grad[0])
        return result
