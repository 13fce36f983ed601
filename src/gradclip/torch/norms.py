"""The flow behind PyTorch's words: norms of any order, its policy for inf, its errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from gradclip import _clip
from gradclip.core.decide import (
    Action,
    Keep,
    OnNonfinite,
    Scale,
    check_clip_norm,
    check_use_norm,
    decide,
)
from gradclip.core.exact import Scaled, ScaledArray
from gradclip.core.held import Held, Measured
from gradclip.core.memory import Lesson
from gradclip.core.opening import taking_part
from gradclip.core.workers import Joint, Workers
from gradclip.kernels.cpu.arithmetic import ieee_arithmetic
from gradclip.torch.backend import hold
from gradclip.torch.following import (
    check_not_functionalized,
    is_written_down,
    looked_away_from,
)
from gradclip.torch.library import number, operand, scalar_like
from gradclip.torch.orders import norm_of_order, powers_of_order
from gradclip.torch.overlap import distinct
from gradclip.torch.unread import ByOperation, Unread, is_without_numbers


def check_order(norm_type: Any) -> float:
    """The order of a norm.

    Raises:
        TypeError, ValueError: it is no number above 0.
    """
    try:
        order = float(norm_type)
    except (TypeError, ValueError):
        raise TypeError(f"norm_type is {norm_type!r}; it must be a number") from None
    if not order > 0:
        raise ValueError(f"norm_type is {norm_type!r}; it must be above 0 (inf: the largest |x|)")
    return order


class GradClip(ByOperation):
    """One clip by PyTorch's words: of any order; without a policy what is inf takes all to 0."""

    __slots__ = ("error_if_nonfinite", "order")

    limit_name, norm_name = "max_norm", "total_norm"

    def __init__(
        self,
        leaves: list[Tensor],
        path: Callable[[int], str],
        max_norm: Any = math.inf,
        total_norm: Any = None,
        on_nonfinite: OnNonfinite | None = None,
        *,
        order: float = 2.0,
        error_if_nonfinite: bool = False,
        part: Joint | None = None,
        wants_each: bool = False,
    ) -> None:
        super().__init__(
            leaves, path, max_norm, total_norm, on_nonfinite, part=part, wants_each=wants_each
        )
        self.order = order
        self.error_if_nonfinite = error_if_nonfinite

    def asked(self, limit: object, given: float | None) -> dict[str, object]:
        del given
        return {
            "max_norm": limit,
            "norm_type": self.order,
            "on_nonfinite": self.on_nonfinite,
            "error_if_nonfinite": self.error_if_nonfinite,
        }

    def measured(self, held: Any) -> Measured:
        """The norm of this order.

        Raises:
            RuntimeError: it is NaN or inf, and that is an error; or another worker has failed.
        """
        found = super().measured(held) if self.order == 2 else self._of_order(held)
        if self.error_if_nonfinite and not math.isfinite(found.norm.significand):
            self._refuse()
        return found

    def measured_each(
        self, held: Any, limit: float | Lesson = math.inf
    ) -> tuple[Measured, ScaledArray]:
        """The norm of order 2, and that of each gradient.

        Raises:
            ValueError: the order is another.
            RuntimeError: the norm is NaN or inf, and that is an error; or another has failed.
        """
        if self.order != 2:
            raise ValueError(
                f"norm_type is {self.order}; tensor by tensor there are norms of order 2"
            )
        found, each = super().measured_each(held, limit)
        if self.error_if_nonfinite and not math.isfinite(found.norm.significand):
            self._refuse()
        return found, each

    def _of_order(self, held: Any) -> Measured:
        if self.part is None:
            powers = [powers_of_order(held.leaves, self.order)]
            return Measured(norm_of_order(powers, self.order, wide=held.wide))
        mine = powers_of_order(held.counted(self.part).leaves, self.order)
        every, wide = self.part.gathered(mine, wide=held.wide)
        return Measured(norm_of_order(every.tolist(), self.order, wide=wide), wide)

    def action(self, norm: Scaled, limit: float) -> Action:
        if self.on_nonfinite is not None:
            return super().action(norm, limit)
        if math.isinf(limit):
            return Keep()  # only measured, whatever the norm
        if math.isinf(norm.significand):
            return Scale(Scaled(0.0, 0))  # PyTorch's factor: what is inf becomes NaN
        return decide(norm, limit, "nan")

    @property
    def is_for_the_host(self) -> bool:
        return self.part is not None or self.order != 2

    @property
    def policy(self) -> str:
        return self.on_nonfinite or "factor"

    @property
    def may_refuse(self) -> bool:
        return self.error_if_nonfinite or super().may_refuse

    def refuse(self, held: Held, norm: float) -> NoReturn:
        if self.error_if_nonfinite:
            self._refuse()
        super().refuse(held, norm)

    # ---- where nothing is to be read: by an operation ----

    def norm_of_unread(self, leaves: Sequence[Tensor]) -> Tensor:
        """The norm of tensors that are written down, or have no memory."""
        return self._asked(_total_norm_op(list(leaves), self.order, self.error_if_nonfinite))

    def clip_unread_(self, held: Unread, leaves: Sequence[Tensor]) -> Tensor | None:
        """Clip such tensors where they are; the norm, if it was not given."""
        check_not_functionalized()
        if self.wants_each:
            held.measure_each()  # which says why not
        limit, given = self.limits(held)
        max_norm = operand(self.limit_name, limit)
        if given is not None:
            _clip_grads_with_norm_op(list(leaves), max_norm, operand(self.norm_name, given))
            return None
        policy = (self.on_nonfinite or "", self.error_if_nonfinite)
        return self._asked(_clip_grads_op(list(leaves), max_norm, self.order, *policy))

    def _asked(self, norm: Tensor) -> Tensor:
        """A norm that may have no value: if it is finite PyTorch refuses to say, as in its own."""
        if self.error_if_nonfinite and not is_written_down():
            bool(norm.isfinite())
        return norm

    def _refuse(self) -> NoReturn:
        raise RuntimeError(
            f"The total norm of order {self.order} for gradients from `parameters` is non-finite, "
            "so it cannot be clipped. To disable this error and scale the gradients by the "
            "non-finite norm anyway, set `error_if_nonfinite=False`"
        )


@looked_away_from
def total_norm(
    tensors: list[Tensor],
    path: Callable[[int], str],
    order: float,
    error_if_nonfinite: bool,
    workers: Workers | None = None,
) -> Tensor:
    """The norm of tensors, each memory counted once."""
    with ieee_arithmetic(), taking_part(workers) as part:
        if part is not None:
            part.asked(norm_type=order, error_if_nonfinite=error_if_nonfinite)
        held = hold(tensors, path, writable=False)
        if not is_without_numbers(held) and len(once := distinct(tensors)) < len(tensors):
            held = hold(once, str, writable=False)
        clip = GradClip(
            tensors, path, order=order, error_if_nonfinite=error_if_nonfinite, part=part
        )
        found: Tensor = held.norm(clip)
        return found


@looked_away_from
def clip_(
    grads: list[Tensor],
    path: Callable[[int], str],
    max_norm: Any,
    order: float,
    on_nonfinite: OnNonfinite | None,
    error_if_nonfinite: bool,
    workers: Workers | None = None,
    keys: Sequence[Any] = (),
    *,
    wants_each: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Clip gradients where they lie; the norm before, and that of each, if it is wanted.

    Where a limit learns, ``keys`` tells them apart from step to step.

    Raises:
        ValueError: the norm of each is wanted, and the order is not 2.
        NotImplementedError: it is, and they have no numbers.
    """
    with torch.no_grad(), ieee_arithmetic(), taking_part(workers) as part:
        if on_nonfinite is not None:
            _clip.check_policy(on_nonfinite)
        max_norm = _clip.lesson_of(max_norm, keys)
        max_norm, _ = _clip.limits_read(max_norm, None, "max_norm")
        held = hold(grads, path, writable=True)
        clip = GradClip(
            grads,
            path,
            max_norm,
            None,
            on_nonfinite,
            order=order,
            error_if_nonfinite=error_if_nonfinite,
            part=part,
            wants_each=wants_each,
        )
        found: Tensor = held.clip_(clip)
    _clip.learn(max_norm)
    return found, None if clip.each is None else held.at_every_place(clip.each, grads)


@looked_away_from
def clip_with_norm_(
    grads: list[Tensor], path: Callable[[int], str], max_norm: Any, total_norm: Any
) -> None:
    """Clip gradients of a norm that is known where they lie."""
    with torch.no_grad(), ieee_arithmetic():
        max_norm = _clip.lesson_of(max_norm, ())
        limits = _clip.limits_read(max_norm, total_norm, "max_norm", "total_norm")
        held = hold(grads, path, writable=True)
        if total_norm is None:  # by which a clip would be asked to measure
            check_clip_norm(max_norm, "max_norm")
            check_use_norm(total_norm, "total_norm")
        held.clip_(GradClip(grads, path, *limits))
    _clip.learn(max_norm)


# ---- operations that torch.compile takes as they are ----


@torch.library.custom_op(
    "gradclip::clip_grads_",
    mutates_args=("grads",),
    schema="(Tensor(a0!)[] grads, Tensor max_norm, float norm_type, str on_nonfinite, "
    "bool error_if_nonfinite) -> Tensor",
)
def _clip_grads_op(
    grads: list[Tensor],
    max_norm: Tensor,
    norm_type: float,
    on_nonfinite: str,
    error_if_nonfinite: bool,
) -> Tensor:
    policy: Any = on_nonfinite or None
    path = "gradients[{}]".format
    return clip_(grads, path, number(max_norm), norm_type, policy, error_if_nonfinite)[0]


@torch.library.custom_op(
    "gradclip::clip_grads_with_norm_",
    mutates_args=("grads",),
    schema="(Tensor(a0!)[] grads, Tensor max_norm, Tensor total_norm) -> ()",
)
def _clip_grads_with_norm_op(grads: list[Tensor], max_norm: Tensor, total_norm: Tensor) -> None:
    limits = number(max_norm), number(total_norm)
    clip_with_norm_(grads, "gradients[{}]".format, *limits)


@torch.library.custom_op(
    "gradclip::total_norm",
    mutates_args=(),
    schema="(Tensor[] tensors, float norm_type, bool error_if_nonfinite) -> Tensor",
)
def _total_norm_op(tensors: list[Tensor], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    return total_norm(tensors, "tensors[{}]".format, norm_type, error_if_nonfinite)


_clip_grads_op.register_fake(lambda grads, *_: scalar_like(grads))
_clip_grads_with_norm_op.register_fake(lambda *_: None)
_total_norm_op.register_fake(lambda tensors, *_: scalar_like(tensors))
