"""Our layers in graphs that are made to run elsewhere, where llmkern may not be.

``torch.jit.trace``, ``torch.export`` and ONNX find torch's own functions (``dispatch.leaves``). Scripting compiles the
text of ``forward``, and is given torch's own class. For ``torch.fx`` a layer of ours is a leaf, as torch's are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch.nn

from .._torch_tree import Replaces

_Self = TypeVar("_Self", bound="Deployable")


class Deployable(Replaces):
    """A base of all our layers. It comes after torch's class, whose methods it leaves alone."""

    # Options that torch's class does not have, with their neutral values.
    _beyond_torch: ClassVar[dict[str, Any]] = {}

    def __new__(cls: type[_Self], *args: Any, **kwargs: Any) -> _Self:
        self = super().__new__(cls)
        if _is_ours(cls):
            # torch.fx, and who extends it, tell leaves by this attribute of the instance; pickle asks the class.
            vars(self)["__module__"] = cls.__module__ if cls._replaced is None else cls._replaced.__module__
            if not vars(self)["__module__"].startswith("torch.nn"):
                vars(self)["__module__"] = torch.nn.modules.__name__
        return self

    def _options_beyond_torch(self) -> list[str]:
        """The options in use that torch's class does not have."""
        return [name for name, neutral in self._beyond_torch.items() if getattr(self, name) != neutral]

    def _torch_forward(self) -> Callable[..., Any] | None:
        """torch's ``forward``, to be called with ``self``, if that is all there is to this layer."""
        theirs: Any = self._replaced
        return None if theirs is None or self._options_beyond_torch() else theirs.forward

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` compiles in place of this layer: torch's own, with the same parameters, buffers and
        hooks. A subclass with a ``forward`` of its own is compiled as it is.

        Raises:
            NotImplementedError: for a class or for options that torch does not have.
        """
        cls = type(self)
        ours = next(base for base in cls.__mro__ if _is_ours(base))
        if cls.forward is not ours.forward:  # type: ignore[attr-defined]
            return self
        theirs: Any = vars(ours).get("_replaced")
        if theirs is None or (options := self._options_beyond_torch()):
            what = ours.__name__ if theirs is None else f"{ours.__name__} with {', '.join(options)}"
            raise NotImplementedError(
                f"torch.jit.script: got {what}, which torch does not have and TorchScript cannot compile; expected"
                " options of torch's class alone; use torch.jit.trace or torch.export"
            )
        if cls is not ours:
            # What a subclass adds, on torch's class.
            added = [vars(base) for base in cls.__mro__[: cls.__mro__.index(ours)]]
            members = {name: value for members in reversed(added) for name, value in members.items()}
            theirs = type(cls.__name__, (theirs,), {k: v for k, v in members.items() if k not in _OF_A_CLASS})
        twin = object.__new__(theirs)
        vars(twin).update({name: value for name, value in vars(self).items() if name != "__module__"})
        return twin


# What type() makes anew.
_OF_A_CLASS = ("__dict__", "__weakref__", "__abstractmethods__", "_abc_impl")


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith(f"{__package__}.")
