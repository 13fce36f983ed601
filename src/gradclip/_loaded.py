"""PyTorch's compiler as the attribute `dynamo`, if somebody has imported it, else None.

It takes an attribute of a module as it finds it. `sys.modules` it would go through entry by entry
where it looks into a function that asks there, and some import others when they are looked at.
"""

from __future__ import annotations

import sys
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "dynamo":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return sys.modules.get("torch._dynamo")
