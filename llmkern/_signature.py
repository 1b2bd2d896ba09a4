"""What ``help`` and editors show of a class that hands most of its arguments on to torch's."""

from __future__ import annotations

import inspect
from typing import Any

_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class FullSignature:
    """For a class's ``__signature__``: the arguments of the first ``__init__`` along its bases that takes no
    ``**kwargs``, without those ``given`` to it, and the keywords of all before it. ``after`` an argument one may come
    that another ``__init__`` takes out of ``*args``: its name and default."""

    def __init__(self, given: tuple[str, ...] = (), after: dict[str, tuple[str, Any]] | None = None) -> None:
        self.given, self.after = given, after or {}

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        keywords: list[inspect.Parameter] = []
        for base in owner.__mro__:
            if (init := vars(base).get("__init__")) is None:
                continue
            parameters = list(inspect.signature(init).parameters.values())[1:]
            named = [p for p in parameters if p.kind not in _OPEN]
            if len(named) == len(parameters):
                return inspect.Signature([*self._visible(named, bool(keywords)), *keywords])
            keywords += [p for p in named if p.kind is p.KEYWORD_ONLY]
        raise TypeError(f"{owner.__name__}: no __init__ with a fixed signature")

    def _visible(self, named: list[inspect.Parameter], handed_on: bool) -> list[inspect.Parameter]:
        """The arguments of an ``__init__``, as somebody sees them whose call is handed on to it."""
        result = []
        for parameter in named:
            if handed_on and parameter.name in self.given:
                continue
            result.append(parameter)
            if handed_on and parameter.name in self.after:
                name, default = self.after[parameter.name]
                result.append(parameter.replace(name=name, default=default, annotation=type(default)))
        return result
