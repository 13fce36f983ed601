"""Clip tensors by their global norm: correctly rounded, at memory speed, the same bits everywhere.

>>> import numpy as np, gradclip
>>> gradients = [np.float32([3]), np.float32([[4]])]
>>> print(gradclip.clip_by_global_norm_(gradients, clip_norm=1.0))
5.0
>>> print(gradclip.global_norm(gradients))
1.0
"""

from typing import TYPE_CHECKING, Any

from gradclip.core import interpreters

interpreters.check()

from gradclip import limits
from gradclip._clip import clip_by_global_norm, clip_by_global_norm_, global_norm, norms
from gradclip.core.norms import Norms
from gradclip.core.sparse import IndexedSlices

if TYPE_CHECKING:
    from gradclip.record import Record

# What is pickled is found by the name that users know, wherever the code stands.
IndexedSlices.__module__ = Norms.__module__ = __name__

__all__ = [
    "IndexedSlices",
    "Norms",
    "Record",
    "clip_by_global_norm",
    "clip_by_global_norm_",
    "global_norm",
    "limits",
    "norms",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What few need, loaded when it is asked for: SQLite comes with it."""
    if name != "Record":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gradclip.record import Record

    globals()[name] = Record
    return Record
