"""How many threads share a walk of memory; `team.c` has them."""

from __future__ import annotations

import os
import sys

# Handing work to a thread that sleeps takes as long as one thread needs to read half of this.
BYTES_PER_THREAD = 1 << 20


def worth(nbytes: int, most: int) -> int:
    """How many threads so many bytes are worth, of at most so many and `number`.

    Raises:
        ValueError: as `number`, however few bytes there are.
    """
    return max(1, min(number(), most, nbytes // BYTES_PER_THREAD))


def number() -> int:
    """``GRADCLIP_NUM_THREADS``, or else the processors this process may use.

    Raises:
        ValueError: the variable is set to something else than a number above 0.
    """
    wanted = os.environ.get("GRADCLIP_NUM_THREADS")
    if wanted is None:
        if sys.platform == "linux":
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
    if not wanted.isdecimal() or not int(wanted):
        raise ValueError(f"GRADCLIP_NUM_THREADS is {wanted!r}; it must be a number above 0")
    return int(wanted)
