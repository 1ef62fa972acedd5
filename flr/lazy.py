"""Names that are imported at their first use, and callbacks that wait for the import of another package."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def attach(
    package: str, names: Mapping[str, Collection[str]], submodules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose names are imported at their first use (PEP 562).

    The package imports the same names under ``typing.TYPE_CHECKING`` too, for type checkers and editors.

    Args:
        package: ``__name__`` of the package.
        names: what each module passes on: names by the module's path inside the package, such as ``"model.patch"``.
        submodules: modules that ``import package; package.module`` finds without an import of their own.

    Returns:
        The two functions. The first raises AttributeError for any other name.

    Example:
        >>> get, names = attach("json", {"decoder": ["JSONDecodeError"]}, ["tool"])
        >>> get("JSONDecodeError").__module__, get("tool").__name__, names()[:2]
        ('json.decoder', 'json.tool', ['JSONDecodeError', 'JSONDecoder'])
        >>> get("loadz")
        Traceback (most recent call last):
        ...
        AttributeError: module 'json' has no attribute 'loadz'
    """
    homes = {name: module for module, passed_on in names.items() for name in passed_on}

    def __getattr__(name: str) -> Any:
        if name in homes:
            value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        elif name in submodules:
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # the next look finds it without a call
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *submodules})

    return __getattr__, __dir__


def when_imported(name: str, callback: Callable[[ModuleType], object]) -> None:
    """Call ``callback(module)`` once: now if the module ``name`` is imported already, else right after its import.

    Nothing is imported on behalf of the callback. One that raises is reported as a RuntimeWarning, so that it does not
    break an import which has nothing to do with it. If the import itself fails, the callback goes on waiting.

    The import may be part of a longer one, whose other modules are half there: a callback should import little, and
    leave the rest to the functions that it registers.

    Args:
        name: full name of a module, such as ``"transformers.models.auto.modeling_auto"``.
        callback: takes the module.

    Example:
        >>> when_imported("json", lambda module: print(module.__name__))
        json
    """
    module = sys.modules.get(name)
    if module is not None:
        _call(name, callback)
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.waiting.setdefault(name, []).append(callback)


def _call(name: str, callback: Callable[[ModuleType], object]) -> None:
    try:
        callback(sys.modules[name])  # a module may have put another object in its place
    except Exception as error:
        what = getattr(callback, "__qualname__", repr(callback))
        message = f"{what}: expected to run after the import of {name}, got {type(error).__name__}: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


class _Finder(MetaPathFinder):
    """Finds what callbacks wait for, through the finders behind it; stays in ``sys.meta_path`` while any waits."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[ModuleType], object]]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None

    def imported(self, name: str) -> None:
        callbacks = self.waiting.pop(name, [])
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        for callback in callbacks:
            _call(name, callback)


class _Loader(Loader):
    """Runs a module by its own loader, which it has back before its first line runs, then the callbacks."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:  # for whoever has found the module and asks for its source
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _FINDER.imported(module.__name__)


_FINDER = _Finder()
