"""What trainers clip by ``torch.nn.utils.clip_grad_norm_`` is measured, each gradient by itself."""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from torch.nn import utils

from gradclip.core.limits import Limit
from gradclip.core.norms import Norms
from gradclip.core.patch import Patch
from gradclip.torch import clip_grad_norm_, patch


class Seen(NamedTuple):
    """Gradients before they were clipped, and by what."""

    norms: Any  # `Norms`, or where tensors cannot be told apart, the global norm
    limit: Any  # a number or a tensor; None where nothing limits them


def measured(parameters: dict[str, Tensor]) -> Norms | Tensor:
    """The norms of parameters' gradients; under FSDP1, which has them in one, the global norm."""
    return _clipped(parameters, math.inf)


def _clipped(
    parameters: Any, max_norm: Any, clip: Any = clip_grad_norm_, *args: Any, **options: Any
) -> Any:
    tensors = parameters.values() if isinstance(parameters, dict) else parameters
    are_flat = any(getattr(each, "_fsdp_flattened", False) for each in tensors)
    return clip(parameters, max_norm, *args, norms=not are_flat, **options)


def limit_in_force(max_norm: Any) -> Any:
    """The limit that the latest clip went by, where a trainer has asked for a number."""
    limit = patch._limit if patch._active else None
    if isinstance(limit, Limit):
        return limit.last_limit
    given = max_norm if limit is None else limit
    is_none = given is None or (
        isinstance(given, int | float) and (given <= 0 or given == math.inf)
    )
    return None if is_none else given


class Observed(Patch):
    """Has a function told of all that ``torch.nn.utils.clip_grad_norm_`` clips.

    Whoever clips keeps doing it: PyTorch, or gradclip, which then tells norms from its own pass.

    Args:
        tell: a method that is called with `Seen` after each clip. Its object is not kept alive:
            with it all ends, as a trainer tells nobody that an exception has ended a training.
        names: a method that gives the name of each parameter.
    """

    _tells: ClassVar[list[Observed]] = []

    def __init__(
        self, tell: Callable[[Seen], None], names: Callable[[list[Tensor]], list[str]]
    ) -> None:
        self._tell = weakref.WeakMethod(tell, lambda _: self.undo())
        self._names = weakref.WeakMethod(names)
        super().__init__()
        self._tells.append(self)

    def undo(self) -> None:
        """Tell no more."""
        if self in self._tells:
            self._tells.remove(self)
        super().undo()

    def told(self, norms: Any, parameters: list[Any], limit: Any) -> None:
        """Parameters have been clipped."""
        tell, names = self._tell(), self._names()
        if tell is not None and names is not None:
            tell(Seen(_named(norms, parameters, names), limit))

    def _install(self) -> None:
        for module in (utils, utils.clip_grad):
            self._put(module, "clip_grad_norm_", _observed(module.clip_grad_norm_))


def _named(norms: Any, parameters: list[Any], names: Callable[[list[Tensor]], list[str]]) -> Any:
    """Norms by the names of parameters, if they came without."""
    if not isinstance(norms, Norms) or any(isinstance(each, tuple) for each in parameters[:1]):
        return norms
    found = names(parameters)
    return Norms(norms.values, norms.global_norm, [found[int(place)] for place in norms.paths])


def _observed(clip: Callable[..., Any]) -> Callable[..., Any]:
    """A function that clips, and then tells of it."""
    is_ours = inspect.unwrap(clip) is clip_grad_norm_

    @functools.wraps(clip)
    def observed(
        parameters: Tensor | Iterable[Tensor],
        max_norm: Any,
        norm_type: Any = 2.0,
        *args: Any,
        **options: Any,
    ) -> Any:
        if not Observed._tells:  # another has replaced it since, and called it
            return clip(parameters, max_norm, norm_type, *args, **options)
        every = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        is_of_order_2 = float(norm_type) == 2.0
        if is_ours and is_of_order_2:
            found = _clipped(every, max_norm, clip, norm_type, *args, **options)
            total_norm = getattr(found, "global_norm", found)
        else:
            found = _clipped(every, math.inf)
            total_norm = clip(every, max_norm, norm_type, *args, **options)
        limit = limit_in_force(max_norm) if is_of_order_2 else None
        for observer in list(Observed._tells):
            observer.told(found, every, limit)
        return total_norm

    return observed
