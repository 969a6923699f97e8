"""Work that waits for the import of a module, so that it costs nothing where that module is never imported."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType


class _FirstImport(MetaPathFinder):
    """Finds one module as Python would, and has `then` called after the module's code has run."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]):
        self.name, self.then = name, then

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # the others find it
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = execute_and_call
        return spec


def when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Calls `then` with the module of that name, once: now, if it is imported already, or after its first import."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _FirstImport(name, then))
