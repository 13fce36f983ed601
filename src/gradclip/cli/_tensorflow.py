"""TensorFlow as the command line loads it."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def import_tensorflow() -> Any:
    """TensorFlow, without its notes on the processor.

    PyTorch and Triton come first: the other way round they do not load into one process.
    """
    for name in ("torch", "triton"):
        if find_spec(name):
            importlib.import_module(name)
    with _stderr_dropped():
        tensorflow = importlib.import_module("tensorflow")
        tensorflow.constant(0, tensorflow.float16)  # the first of its kind brings a note too
        return tensorflow


@contextlib.contextmanager
def _stderr_dropped() -> Iterator[None]:
    """Drop what native code writes past `sys.stderr`: TensorFlow heeds no setting for it."""
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
