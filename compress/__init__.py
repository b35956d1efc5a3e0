"""Takes a trained CNN and a recipe, gives back a CNN that does the same job with less."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.checkpoint import load, save
    from compress.errors import CheckpointError
    from compress.run import run
    from compress.task import Task

__version__ = "0.1.0"

__all__ = ["CheckpointError", "Task", "__version__", "load", "run", "save"]

_HOME = {
    "CheckpointError": "compress.errors",
    "Task": "compress.task",
    "load": "compress.checkpoint",
    "run": "compress.run",
    "save": "compress.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Fetch a public name when it is first asked for, so that `import compress` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    # `compress.run` is a function that lives in a file of the same name, and Python puts an imported submodule into
    # its package under its name: without this, whether `compress.run` can be called depends on who imported what first.
    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
