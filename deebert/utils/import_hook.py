"""Work that waits for the import of a module, so that it costs nothing where that module is never imported."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder


class _FirstImport(MetaPathFinder):
    """Finds one module as Python would, and has `then` called after the module's code has run."""

    def __init__(self, name: str, then: Callable[[], None]):
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
                self.then()

            spec.loader.exec_module = execute_and_call
        return spec


def when_imported(name: str, then: Callable[[], None]) -> None:
    """Calls `then` once: now, if the module of that name is imported already, or after its first import."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _FirstImport(name, then))
