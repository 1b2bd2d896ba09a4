"""torch's tree of modules under our names, and torch's instances under our classes.

Whatever is below ``torch.nn`` is found below ``llmkern.nn``, and whatever is below ``torch.optim`` below
``llmkern.optim``. It *is* torch's module, whose file is not executed again; only a module that makes public what we
replace (``torch.nn.modules.rnn``, say) has a stand-in, whose other names are torch's.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from abc import ABCMeta
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, ClassVar


class Replaces(metaclass=ABCMeta):  # noqa: B024
    """A base of classes that take the place of torch's: ``isinstance(m, nn.Linear)`` is asked of the layers inside
    ``nn.TransformerEncoderLayer`` too, which are torch's. Subclasses claim nothing but their own instances.

    The metaclass is the standard library's, so that user classes may have bases with ``abc.ABC`` or a protocol among
    them, and a metaclass that derives from ``ABCMeta``.
    """

    _replaced: ClassVar[type | None] = None

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        theirs = vars(cls).get("_replaced")
        return True if theirs is not None and issubclass(other, theirs) else NotImplemented


def mount(package: str, torch_root: ModuleType, replaced: dict[Any, Any]) -> None:
    """Puts the tree below ``torch_root``, which is loaded, below our ``package``. ``replaced``: torch's objects and
    ours in their places."""
    for theirs, ours in replaced.items():
        if isinstance(ours, type) and issubclass(ours, Replaces):
            ours._replaced = theirs
    # An earlier import of this package, since purged from `sys.modules`, left one.
    sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "mounted_at", None) != package]
    tree = _Tree(package, torch_root.__name__, {id(theirs): (theirs, ours) for theirs, ours in replaced.items()})
    sys.meta_path.insert(0, tree)
    tree.mount_loaded(torch_root.__name__)


class _Tree(MetaPathFinder, Loader):
    """Stands first among the finders: torch's packages have paths, on which another would find torch's files, and
    execute them again."""

    def __init__(self, package: str, torch_root: str, replaced: dict[int, tuple[Any, Any]]) -> None:
        self.mounted_at, self.torch_root, self.replaced = package, torch_root, replaced

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(self.mounted_at + "."):
            return None
        if name.rpartition(".")[0] == self.mounted_at and PathFinder.find_spec(name, path) is not None:
            return None
        found = importlib.util.find_spec(self._theirs(name))
        if found is None:
            return None
        return ModuleSpec(name, self, origin=found.origin, is_package=found.submodule_search_locations is not None)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        theirs = importlib.import_module(self._theirs(name))
        ours = self._ours(theirs)
        if ours:
            vars(module).update(ours, __file__=__file__)
            _complete(module, theirs)
        else:
            sys.modules[name] = theirs
        self.mount_loaded(theirs.__name__)

    def mount_loaded(self, torch_root: str) -> None:
        """Names what torch has loaded below ``torch_root``. Left to import statements, a submodule would be made an
        attribute of its package, where torch may have a function of that name (``torch.nn.utils.weight_norm``)."""
        for theirs in sorted(name for name in sys.modules if name.startswith(torch_root + ".")):
            name = self.mounted_at + theirs.removeprefix(self.torch_root)
            if name in sys.modules:
                # A file of ours; torch's has names that it has not.
                _complete(sys.modules[name], sys.modules[theirs])
                continue
            if not self._ours(sys.modules[theirs]):
                sys.modules[name] = sys.modules[theirs]
                continue
            spec = ModuleSpec(name, self, is_package=hasattr(sys.modules[theirs], "__path__"))
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            self.exec_module(module)
            (package, _, child), torch_package = name.rpartition("."), theirs.rpartition(".")[0]
            if getattr(sys.modules[torch_package], child, None) is sys.modules[theirs]:
                setattr(sys.modules[package], child, module)

    def _theirs(self, name: str) -> str:
        return self.torch_root + name.removeprefix(self.mounted_at)

    def _ours(self, theirs: ModuleType) -> dict[str, Any]:
        """What a module of torch's makes public that we replace."""
        public = {name: id(vars(theirs).get(name)) for name in getattr(theirs, "__all__", ())}
        return {name: self.replaced[key][1] for name, key in public.items() if key in self.replaced}


def _complete(module: ModuleType, theirs: ModuleType) -> None:
    """Gives a module of ours the other names of ``theirs``, as they are when they are asked for."""
    if module is theirs or "__getattr__" in vars(module):
        return

    def __getattr__(name: str) -> Any:
        return getattr(theirs, name)

    def __dir__() -> list[str]:
        return sorted({*vars(module), *dir(theirs)})

    vars(module).update(__getattr__=__getattr__, __dir__=__dir__)
