"""A framework that nobody has heard of: `rooms/toyarrays/backend.py` is all that it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Array:
    """Numbers of a dtype, row by row."""

    memory: bytearray
    dtype: str
    shape: tuple[int, ...]
