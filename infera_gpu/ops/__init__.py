"""The operators' declarations: one file a family, each ending with its `OPS`."""

from __future__ import annotations

import importlib
import pkgutil
import threading
from collections.abc import Iterable, Iterator
from functools import cache

from infera_gpu.op import Op, Registry
from infera_gpu.ops._index import INDEX


def modules() -> list[str]:
    """The files of this package that may declare operators."""
    return [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]


def declared(module: str) -> tuple[Op, ...]:
    """The operators of one file, which is imported."""
    found: tuple[Op, ...] = getattr(importlib.import_module(f"{__name__}.{module}"), "OPS", ())
    return found


class _Declared(Registry):
    """Imports the files that declare a name when it is looked up, as the index says; files that it has not, at once.

    Every file is imported only for a name that is nowhere else: that takes longer than loading a small model.
    """

    def __init__(self) -> None:
        super().__init__()
        self._left = dict.fromkeys(modules())
        self._by_name: dict[str, list[str]] = {}
        self._importing = threading.RLock()
        indexed: set[str] = set()
        for module, *names in map(str.split, INDEX.splitlines()):
            indexed.add(module)
            for name in names:
                self._by_name.setdefault(name, []).append(module)
        self._new = [module for module in self._left if module not in indexed]

    def _import(self, modules: Iterable[str]) -> None:
        with self._importing:
            for module in modules:
                if module in self._left:
                    self.add(declared(module))
                    del self._left[module]

    def _versions(self, domain: str, name: str) -> list[Op]:
        self._import([*self._new, *self._by_name.get(f"{domain}.{name}" if domain else name, ())])
        found = super()._versions(domain, name)
        if not found and self._left:
            self._import(list(self._left))
            found = super()._versions(domain, name)
        return found

    def __iter__(self) -> Iterator[Op]:
        self._import(list(self._left))
        return super().__iter__()


@cache
def registry() -> Registry:
    """Every operator declared in this package."""
    return _Declared()
