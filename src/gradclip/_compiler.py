"""PyTorch's compiler, which has to be asked about before PyTorch's room may be opened.

Two attributes, looked up when they are asked for: ``dynamo`` is the compiler, if somebody has
imported it, else None; ``compiled`` is the file ``compiled.py`` of its framework's room, which is
found by that framework's name, as rooms are.

The compiler takes an attribute of a module as it finds it. `sys.modules` it would go through entry
by entry where it looks into a function that asks there, and some import others when looked at.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_COMPILER = "torch._dynamo"
_ROOM = _COMPILER.partition(".")[0]


def __getattr__(name: str) -> Any:
    if name == "dynamo":
        return sys.modules.get(_COMPILER)
    if name == "compiled":
        return importlib.import_module(f"gradclip.{_ROOM}.compiled")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
