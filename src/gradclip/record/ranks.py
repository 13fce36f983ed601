"""Which of several processes this is: one alone writes."""

from __future__ import annotations

import os
import sys
from typing import Any


def rank_of(given: int | None) -> int:
    """The rank: what is given, or what a framework or the launcher says; 0 if nobody does.

    Raises:
        TypeError, ValueError: what is given, or in the environment's ``RANK``, is no rank.
    """
    if given is not None:
        if type(given) is not int:
            raise TypeError(f"rank is {given!r}; it must be an int, or None to find out")
        if given < 0:
            raise ValueError(f"rank is {given}; it must be 0 or above")
        return given
    for found in (_of_torch(), _of_jax(), _of_launcher()):
        if found is not None:
            return found
    return 0


def _of_torch() -> int | None:
    torch: Any = sys.modules.get("torch.distributed")
    if torch is None or not torch.is_available() or not torch.is_initialized():
        return None
    return int(torch.get_rank())


def _of_jax() -> int | None:
    jax: Any = sys.modules.get("jax")
    # Asked for its index it would begin all its devices.
    if jax is None or not jax.distributed.is_initialized():
        return None
    return int(jax.process_index())


def _of_launcher() -> int | None:
    said = os.environ.get("RANK")
    if not said:
        return None
    if not said.isdecimal():
        raise ValueError(f"the environment's RANK is {said!r}; it must be a number, or give rank=")
    return int(said)
