"""What Keras saves of an optimizer's variables, and what an optimizer takes over of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradclip.keras.measured import NORMS


def saved_variables(optimizer: Any) -> list[Any]:
    """All variables of an optimizer but the norms of each gradient, which are of one ``fit``."""
    each = optimizer._each
    return [x for x in optimizer.variables if each is None or x is not each.variable]


def take(optimizer: Any, saved: Sequence[Any]) -> None:
    """Go on from what was saved of our variables; what was not saved begins."""
    for variable, value in zip(optimizer._ours, saved, strict=False):
        optimizer.assign(variable, value)


def load(optimizer: Any, store: Any) -> bool:
    """Take over what was saved; False where it is for Keras to say that it does not fit."""
    ours, variables = optimizer._ours, saved_variables(optimizer)
    others = [each for each in variables if all(each is not one for one in ours)]
    more = [np.asarray(store[str(place)]) for place in range(len(others), len(store.keys()))]
    same = len(store.keys()) == len(variables)
    fits = len(more) < len(ours) and _alike(more, ours[: len(more)])
    waits = not ours and more and _could_be_ours(more)
    if len(store.keys()) < len(others) or not (same or fits or waits):
        return False
    for place, variable in enumerate(variables if same else others):
        variable.assign(store[str(place)])
    if same:
        return True
    if waits:
        optimizer._waiting = more
    else:
        take(optimizer, more)
    return True


def _alike(saved: list[Any], variables: list[Any]) -> bool:
    return [each.shape for each in saved] == [tuple(each.shape) for each in variables]


def _could_be_ours(saved: list[Any]) -> bool:
    """If these are norms, and what a limit has learnt, and nothing else."""
    norms, *learnt = saved
    return norms.shape == (NORMS,) and all(each.dtype == np.int32 for each in learnt)
