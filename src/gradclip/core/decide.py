"""Scalars only: the limits a user gives, the factor, and what to do about NaN and inf.

The formula of clipping stands here and nowhere else:

    factor = 1                    if norm <= clip_norm
    factor = clip_norm / norm     otherwise
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from gradclip.core.exact import Scaled, ScaledArray

OnNonfinite = Literal["nan", "raise", "zero", "keep"]
OnNonfiniteStep = Literal["nan", "raise", "zero", "keep", "skip"]  # where there is a step to skip


class Keep(NamedTuple):
    """Leave every element as it is."""


class Fill(NamedTuple):
    """Put one value into every element."""

    value: float


class Scale(NamedTuple):
    """Multiply every element by a factor."""

    factor: Scaled


class ScaleEach(NamedTuple):
    """Multiply the elements of each leaf by a factor of its own."""

    factors: ScaledArray


class Raise(NamedTuple):
    """Raise FloatingPointError before anything is written."""


Write = Keep | Fill | Scale | ScaleEach
Action = Write | Raise

_POLICIES, _POLICIES_OF_STEPS = get_args(OnNonfinite), get_args(OnNonfiniteStep)


def check_clip_norm(clip_norm: Any, name: str = "clip_norm") -> float:
    """``clip_norm``, by the name that its user gave it, as a float above 0.

    Raises:
        TypeError: it is no real scalar.
        ValueError: it is zero, negative, NaN or an array of any shape but ().
        NotImplementedError: it is a limit that learns, where none can.
    """
    if hasattr(clip_norm, "judge"):
        raise NotImplementedError(
            f"{name} is {clip_norm!r}, which learns from each norm; where a clip is "
            "differentiated, traced or compiled it must be a number, as its last_limit is, or the "
            "limit of an optimizer, which has a place for what is learnt"
        )
    value = clip_norm if type(clip_norm) is float else real_number(name, clip_norm)
    if not value > 0:
        raise ValueError(f"{name} is {clip_norm!r}; it must be above 0 (inf: only measure)")
    return value


def check_use_norm(use_norm: Any, name: str = "use_norm") -> Scaled:
    """``use_norm``, by the name that its user gave it, as the norm to scale by.

    Raises:
        TypeError: it is no real scalar.
        ValueError: it is negative or an array of any shape but ().
    """
    value = real_number(name, use_norm)
    if value < 0:
        raise ValueError(f"{name} is {use_norm!r}; a norm is never negative")
    return Scaled.of(abs(value))


def check_on_nonfinite(on_nonfinite: Any, *, steps: bool = False, skipped_by: str = "") -> None:
    """Hold ``on_nonfinite`` against the policies; with ``steps``, of an optimizer's step too.

    ``skipped_by`` is what an error points to where there is no step to skip.

    Raises:
        ValueError: it is none of them.
    """
    known = _POLICIES_OF_STEPS if steps else _POLICIES
    word = on_nonfinite if isinstance(on_nonfinite, str) else None  # an array compares otherwise
    if word not in known:
        choices = ", ".join(map(repr, known))
        hint = f". There is no step to skip: {skipped_by} has one"
        hint = hint if word == "skip" and skipped_by else ""
        raise ValueError(f"on_nonfinite is {on_nonfinite!r}; it must be one of {choices}{hint}")


def check_no_group(group: Any) -> None:
    """Where a gradient cannot be spread over workers.

    Raises:
        NotImplementedError: a group is given.
    """
    if group is not None:
        raise NotImplementedError(f"group is {group!r}; there is none for these leaves")


def real_number(name: str, value: Any) -> float:
    """A Python number or 0-d array as a float.

    Raises:
        TypeError, ValueError: it is anything else; the text shows it.
    """
    shape = tuple(getattr(value, "shape", ()))
    if shape != ():
        raise ValueError(f"{name} is {value!r} of shape {shape}; it must be a scalar")
    dtype = getattr(value, "dtype", None)
    kind = getattr(dtype, "kind", "f")  # of NumPy's dtypes: c complex, O object, S and U text, ...
    real = isinstance(value, numbers.Real) if dtype is None else kind not in "cOSUmM"
    if not real or isinstance(value, bool) or "bool" in str(dtype) or "complex" in str(dtype):
        raise TypeError(f"{name} is {value!r}; it must be a real number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is {_shown(value)}; it must fit a float64") from None


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no integer of over 4300 digits
        return f"a number of over 4300 digits, of type {type(value).__name__}"


def decide(norm: Scaled, clip_norm: float, on_nonfinite: OnNonfinite) -> Action:
    """What becomes of the elements of leaves whose global norm is ``norm``."""
    if not math.isfinite(norm.significand):
        actions: dict[OnNonfinite, Action] = {
            "nan": Fill(math.nan),
            "zero": Fill(0.0),
            "keep": Keep(),
            "raise": Raise(),
        }
        return actions[on_nonfinite]
    if at_most(norm, clip_norm):
        return Keep()
    return Scale(factor(norm, clip_norm))


def at_most(norm: Scaled, clip_norm: float) -> bool:
    """If a norm is at most the limit; it is not where it is above it, inf or NaN.

    The limit is 0 where a step is to be skipped and there is none.
    """
    if not (norm.significand and math.isfinite(norm.significand) and 0 < clip_norm < math.inf):
        return norm.significand <= clip_norm
    limit = Scaled.of(clip_norm)
    return (norm.exponent, norm.significand) <= (limit.exponent, limit.significand)


def factor(norm: Scaled, clip_norm: float) -> Scaled:
    """``clip_norm / norm`` rounded to 53 bits, the exponent without a limit."""
    limit = Scaled.of(clip_norm)
    significand, exponent = math.frexp(limit.significand / norm.significand)
    return Scaled(significand, exponent + limit.exponent - norm.exponent)


def factors(norms: ScaledArray, limits: npt.NDArray[np.float64]) -> ScaledArray:
    """As `factor` of each norm and its limit; exactly 1 where `at_most` holds."""
    significand, exponent = np.frexp(limits)
    above = (norms.exponent > exponent) | (
        (norms.exponent == exponent) & (norms.significand > significand)
    )
    above &= (norms.significand > 0) & (limits < math.inf)
    with np.errstate(invalid="ignore"):  # inf / 1, where none is above
        quotient, shift = np.frexp(significand / np.where(above, norms.significand, 1.0))
    one, place = math.frexp(1.0)
    return ScaledArray(
        np.where(above, quotient, one),
        np.where(above, shift.astype(np.int64) + exponent - norms.exponent, place),
    )
