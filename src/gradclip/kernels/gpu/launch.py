"""What PyTorch and CuPy need alike to reach a device's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# What the kernels of `triton` need.
TRITON = "triton>=3.6"
# How they are compiled.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


def is_run(shape: Sequence[int], strides: Sequence[int], step: int) -> bool:
    """If elements lie one after the other, in whatever order of dimensions; none lies twice."""
    if 0 in shape:
        return True
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length > 1 and stride != step:
            return False
        step *= length
    return True


class Reserve:
    """Pinned memory for what captured graphs send to the device, of which no part is given back.

    A graph reads it again at each replay. There may be none to be had while capturing, so it is
    taken before.
    """

    def __init__(self, make: Callable[[int], Any], words: int = 1 << 17) -> None:
        self._make = make
        self._words = words
        self._left: Any = None

    def take(self) -> None:
        """Have it, from the first time on."""
        if self._left is None:
            self._left = self._make(self._words)

    def keep(self, words: Any) -> Any:
        """A copy of words, for ever.

        Raises:
            RuntimeError: there is no room left for it.
        """
        if self._left is None or len(words) > len(self._left):
            raise RuntimeError(
                f"no pinned memory is left for the {len(words) // 3} chunks of a clip that is "
                "being captured; clip once before capturing, or fewer graphs"
            )
        part, self._left = self._left[: len(words)], self._left[len(words) :]
        part[:] = words
        return part
