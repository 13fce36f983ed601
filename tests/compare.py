"""Run gradclip on a case and hold every bit against the oracle. `test_mutations` breaks gradclip
and sees these functions raise AssertionError."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import gradclip
import oracle
from cases import READ_ONLY_LAYOUTS, Case, lay_out, real_dtype
from oracle import Clipped

Array = npt.NDArray[Any]


def codes(array: Array) -> Array:
    """The bits of an array in the order of its indices, as unsigned integers."""
    native = np.array(array, array.dtype.newbyteorder("="), order="C", ndmin=1)
    return native.view(f"u{real_dtype(native.dtype).itemsize}")


def assert_same_bits(actual: Any, expected: Array, *, nan_payload: bool) -> None:
    """The same dtype, shape and bits; of a NaN only where ``nan_payload`` says so."""
    assert actual.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=")
    assert actual.shape == expected.shape
    got, wanted = codes(actual), codes(expected)
    same = got == wanted
    if not nan_payload and not same.all():
        real = real_dtype(expected.dtype)
        same |= np.isnan(got.view(real)) & np.isnan(wanted.view(real))
    if not same.all():
        place = int(np.flatnonzero(~same)[0])
        raise AssertionError(
            f"number {place} of a {actual.dtype} leaf of shape {actual.shape} has the bits "
            f"{got.flat[place]:#x}, not {wanted.flat[place]:#x}"
        )


def assert_norm(actual: Any, expected: np.floating[Any]) -> None:
    """The same NumPy scalar."""
    assert type(actual) is type(expected), (type(actual), type(expected))
    same = actual == expected or (np.isnan(actual) and np.isnan(expected))
    assert same, f"the norm is {actual!r}, not {expected!r}"


def build(case: Case, *, writable: bool) -> list[Array]:
    """New leaves; those that could not be written are contiguous where they are to be."""
    return [
        lay_out(values, "contiguous" if writable and layout in READ_ONLY_LAYOUTS else layout)
        for values, layout in zip(case.values, case.layouts, strict=True)
    ]


def expected_of(case: Case) -> Clipped:
    """What the oracle says."""
    return oracle.clip(case.values, case.clip_norm, case.use_norm, case.on_nonfinite)


def check(case: Case, expected: Clipped | None = None) -> None:
    """Both functions on one case, against the oracle."""
    wanted = expected or expected_of(case)
    check_out_of_place(case, wanted)
    check_in_place(case, wanted)


def check_out_of_place(case: Case, expected: Clipped) -> None:
    """`clip_by_global_norm` and `global_norm`: the outputs, and the inputs as they were."""
    leaves = build(case, writable=False)
    options: dict[str, Any] = {"use_norm": case.use_norm, "on_nonfinite": case.on_nonfinite}
    if expected.leaves is None:
        assert_raises(gradclip.clip_by_global_norm, leaves, case.clip_norm, **options)
    else:
        clipped, norm = gradclip.clip_by_global_norm(leaves, case.clip_norm, **options)
        assert_norm(norm, expected.norm)
        assert_leaves(clipped, expected)
        for new, old in zip(clipped, leaves, strict=True):
            assert new.dtype == old.dtype
            assert new.strides == np.empty_like(old).strides
            assert not np.may_share_memory(new, old)
    assert_untouched(leaves, case.values)
    if case.use_norm is None:
        assert_norm(gradclip.global_norm(leaves), expected.norm)


def check_in_place(case: Case, expected: Clipped) -> None:
    """`clip_by_global_norm_`."""
    leaves = build(case, writable=True)
    options: dict[str, Any] = {"use_norm": case.use_norm, "on_nonfinite": case.on_nonfinite}
    if expected.leaves is None:
        assert_raises(gradclip.clip_by_global_norm_, leaves, case.clip_norm, **options)
        assert_untouched(leaves, case.values)
    else:
        assert_norm(gradclip.clip_by_global_norm_(leaves, case.clip_norm, **options), expected.norm)
        assert_leaves(leaves, expected)


def assert_leaves(leaves: Sequence[Any], expected: Clipped) -> None:
    """Every element of every leaf."""
    assert expected.leaves is not None
    for actual, wanted in zip(leaves, expected.leaves, strict=True):
        assert_same_bits(actual, wanted, nan_payload=expected.kept)


def assert_untouched(leaves: Sequence[Any], values: Sequence[Array]) -> None:
    """Every bit as it was."""
    for actual, wanted in zip(leaves, values, strict=True):
        assert_same_bits(actual, wanted, nan_payload=True)


def assert_raises(function: Any, *args: Any, **options: Any) -> None:
    """A call that must raise FloatingPointError."""
    try:
        function(*args, **options)
    except FloatingPointError:
        return
    raise AssertionError("FloatingPointError was not raised")
