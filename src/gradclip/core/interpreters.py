"""In which interpreters of a process gradclip can be imported.

NumPy loads in one of them alone, and in none that has a lock of its own. The import of optree in
any but the main one of Python 3.11 does not return.
"""

from __future__ import annotations

import importlib
import sys

_WAY_OUT = "import gradclip in the main interpreter, or give each worker a process"


def check() -> None:
    """Import NumPy and optree, where an interpreter can.

    Raises:
        ImportError: it cannot, and not since they are missing.
    """
    if sys.version_info < (3, 12) and not _is_main():
        raise ImportError(f"Python 3.11 imports optree in the main interpreter alone; {_WAY_OUT}")
    try:
        import numpy  # noqa: F401
        import optree  # noqa: F401
    except ModuleNotFoundError:
        raise
    except ImportError as error:
        if _is_main():
            raise
        raise ImportError(
            "NumPy loads in one interpreter of a process, which shares the main one's lock, and "
            f"this is another; {_WAY_OUT}"
        ) from error


def _is_main() -> bool:
    name = "_xxsubinterpreters" if sys.version_info < (3, 13) else "_interpreters"
    try:
        interpreters = importlib.import_module(name)
    except ModuleNotFoundError:  # as in PyPy, which has no other interpreters
        return True
    return bool(interpreters.get_current() == interpreters.get_main())
