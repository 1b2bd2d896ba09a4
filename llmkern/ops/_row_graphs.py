"""Tables with row gradients in graphs: ``torch.compile(fullgraph=True)`` and ``torch.export``.

The compiler leaves its graph at a subclass with ``__torch_dispatch__``, and a lookup there is eager: its gradient is
one of rows. Where it may not leave, it is given a plain tensor in the table's place (:attr:`RowTensor.plain`), and asks
for it anew in each run. The gradient is dense then, and so is the step.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

from .._graphs import exporter
from .._when_loaded import when_loaded
from ._row_tensors import RowTensor


def trace_row_tables() -> None:
    """Lets the compiler trace them: now, if it is loaded, else when it is. Loading it takes seconds."""
    when_loaded("torch._dynamo.variables.builder", _patch)


def _patch(builder: ModuleType) -> None:
    variables: Any = getattr(builder, "VariableBuilder", None)
    source: Any = getattr(builder, "AttrSource", None)
    wrap = getattr(variables, "_wrap", None)
    if wrap is None or source is None or not hasattr(variables, "wrap_tensor"):
        # Another version of the compiler, which refuses tables.
        return

    @wraps(wrap)
    def _wrap(self: Any, value: Any) -> Any:
        if not issubclass(type(value), RowTensor) or not getattr(self.tx, "one_graph", False):
            return wrap(self, value)
        if exporter() is not None:
            # An exporter knows parameters by their names, and runs nothing.
            return self.wrap_tensor(value)
        return type(self)(self.tx, source(self.source, "plain"))(value.plain)

    variables._wrap = _wrap
