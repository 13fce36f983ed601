"""Units of a parameter, such as the weights into one neuron: what the gradient of each may be.

The formula of adaptive gradient clipping (Brock et al., 2021, arXiv:2102.06171) stands here and
nowhere else:

    limit = clipping * max(norm of the unit's weights, eps)

by which each unit of the gradient is clipped as a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradclip.core.decide import check_clip_norm, real_number


def limits_of_units(maximum: Callable[[Any, Any], Any], norms: Any, clipping: Any, eps: Any) -> Any:
    """The limit of each unit.

    Args:
        maximum: of the framework, as NumPy's.
        norms: of the units' weights, float64.
        clipping: what part of it the gradient may have.
        eps: the least norm to reckon with, so that weights of 0 can grow.
    """
    return clipping * maximum(norms, eps)


def check_units(clipping: Any, eps: Any, name: str = "clipping") -> tuple[float, float]:
    """The two, the first by the name that its user gave it, as floats.

    Raises:
        TypeError, ValueError: one is out of range or no real scalar.
    """
    least = real_number("eps", eps)
    if not least > 0:
        raise ValueError(f"eps is {eps!r}; it must be above 0, or a weight of 0 stays 0 for ever")
    return check_clip_norm(clipping, name), least
