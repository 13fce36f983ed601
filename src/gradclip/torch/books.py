"""What is known of an optimizer's steps where a device knows it: norms, factors and counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Words of 8 bytes, as `kernels.cuda.measure` has them.
STEPS, CLIPPED, LATEST, DIVISOR, SKIPPED, SKIPS, _BEFORE, _WORDS = 0, 1, 2, 3, 4, 5, 6, 10


class There:
    """What a clipper knows of its steps, where it is a device that knows it."""

    def __init__(self, memory: Any, lists: int) -> None:
        self._memory = memory
        self.words: Tensor = memory.zeros(_WORDS)
        self.factors: list[Tensor] = list(memory.zeros(lists).view(torch.float64).fill_(1.0))
        self.norms: list[Tensor] = [memory.scalar(wide=False).zero_() for _ in range(lists)]

    @property
    def divisor(self) -> Tensor:
        """What a fused optimizer divides by."""
        return self.words.view(torch.float32)[2 * DIVISOR]

    @property
    def skips(self) -> Tensor:
        """1 where a fused optimizer is to take no step, else 0."""
        return self.words.view(torch.float32)[2 * SKIPS]

    def take_back(self) -> None:
        """Count the latest step no more."""
        now = [STEPS, CLIPPED, LATEST, SKIPPED]
        self.words[now] = self.words[_BEFORE:].clone()

    def into(
        self, place: int, wide: bool, amp: Sequence[Tensor | None], *, folds: bool
    ) -> dict[str, Any]:
        """Where the norm of one list, and all that comes with it, are to be written."""
        if wide != (self.norms[place].dtype is torch.float64):
            self.norms[place] = self._memory.scalar(wide=wide).zero_()
        from gradclip.kernels.gpu.leaves import Ledger  # of which nobody has need without a device

        scale, found_inf = (0 if each is None else each.data_ptr() for each in amp)
        ledger = Ledger(
            words=self.words.data_ptr(),
            factor=self.factors[place].data_ptr(),
            begins=int(place == 0),
            folds=int(folds),
            scale=scale,
            found_inf=found_inf,
        )
        return {"norm": self.norms[place], "ledger": ledger}

    def told(self, scalars: Sequence[Tensor], *, per_group: bool) -> Tensor:
        """A copy that later steps leave alone."""
        wide = any(each.dtype is torch.float64 for each in scalars)
        every = [each.double() if wide else each for each in scalars]
        return torch.stack(every) if per_group else every[0].clone()
