"""What a clip tells a record of its latest step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gradclip.core.norms import Norms


class Reading(NamedTuple):
    """Numbers of one step, as they are then, wherever they are: nobody has waited for them.

    Each is a number, a scalar or vector of a framework that nobody writes to any more, or a list of
    such: one for each group or tensor.

    Attributes:
        norm: before clipping; None if nobody has measured.
        limit: that was in force; None if none is known.
        factor: what gradients were multiplied by; None if it is to be told from norm and limit.
        norms: of each tensor, for each list of tensors, or what makes them.
        taken: if the step was taken. Of a device a vector of that, and of whether the clip had it
            skipped: where neither is true another had, as GradScaler does, and nothing of it was
            measured.
        skipped_of: where that is not known, how many steps were not taken so far, and of how many.
        begun: how many steps were begun so far; the same again tells that none has been since.
    """

    norm: Any
    limit: Any = None
    factor: Any = None
    norms: Sequence[Norms | Callable[[], Norms]] = ()
    taken: Any = True
    skipped_of: Any = None
    begun: int | None = None
