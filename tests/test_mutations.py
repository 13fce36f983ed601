"""The suite sees what it is there to see: each mutation of gradclip makes a check of it fail."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import mutant
import test_bits
import test_spec
from builds import build
from cases import Case
from compare import check
from conftest import simple
from gradclip import _clip, clip_by_global_norm
from gradclip.core import decide, exact, held
from gradclip.core.decide import Fill, Scale
from gradclip.core.exact import FLOAT64, Scaled
from gradclip.kernels import cpu
from gradclip.kernels.cpu import leaves as host_leaves
from gradclip.numpy import backend
from gradclip.numpy.backend import Leaves
from host import HAS_MXCSR, flush_to_zero, run_python

# ---- mutations of the Python code ----

true_factor, true_root, true_decide = decide.factor, exact.root, decide.decide
NO_NUMBER = "True; it must be a real number"
true_take = cpu.take
true_total_of, true_measure = exact.total_of, Leaves.measure


def take_as_if_only_to_read(arrays: Any, decode: Any, *, writable: bool) -> Any:
    assert isinstance(writable, bool)
    return true_take(arrays, decode, writable=False)


def factor_one_ulp_up(norm: Scaled, clip_norm: float) -> Scaled:
    factor = true_factor(norm, clip_norm)
    return Scaled(math.nextafter(factor.significand, 2), factor.exponent)


def factor_one_single_ulp_up(norm: Scaled, clip_norm: float) -> Scaled:
    factor = true_factor(norm, clip_norm)
    return Scaled(float(np.nextafter(np.float32(factor.significand), 2)), factor.exponent)


def factor_with_eps(norm: Scaled, clip_norm: float) -> Scaled:
    return true_factor(Scaled.of(float(norm) + 1e-6), clip_norm)


def factor_in_single_precision(norm: Scaled, clip_norm: float) -> Scaled:
    return Scaled.of(float(np.float32(float(true_factor(norm, clip_norm)))))


def factor_with_the_limit_of_float64(norm: Scaled, clip_norm: float) -> Scaled:
    return Scaled.of(float(true_factor(norm, clip_norm)))


def total_one_unit_up(*words: bytes) -> Any:
    total = true_total_of(*words)
    total[0] += 1
    return total


def root_with_ties_away(integer: int, unit: int, to: Any) -> Scaled:
    return true_root(integer + 1, unit, to) if integer else true_root(integer, unit, to)


def root_rounded_twice(integer: int, unit: int, to: Any) -> Scaled:
    once = true_root(integer, unit, FLOAT64)
    return once if to == FLOAT64 else exact._round24(float(once))


def measure_with_the_limit_of_the_dtype(leaves: Any) -> Scaled:
    return Scaled.of(float(leaves.scalar(true_measure(leaves))))


def decide_to_multiply_by_one(norm: Scaled, *limits: Any) -> Any:
    action = true_decide(norm, *limits)
    return Scale(Scaled(0.5, 1)) if action == decide.Keep() else action


def decide_to_keep_at_nearly_the_limit(norm: Scaled, clip_norm: float, policy: Any) -> Any:
    return true_decide(norm, clip_norm * (1 + 1e-15), policy)


def decide_to_fill_with_zero(*arguments: Any) -> Any:
    action = true_decide(*arguments)
    return Fill(0.0) if isinstance(action, Fill) else action


def copies_in_c_order(leaves: Any) -> list[Any]:
    return leaves.rewrapped([values.copy(order="C") for values in leaves.values])


def check_random_float32() -> None:
    for case in test_bits.random_cases("float32", 50):
        check(case)


def check_random_float64() -> None:
    for case in test_bits.random_cases("float64", 50):
        check(case)


def check_ties() -> None:
    for name in ("float32", "float64"):
        dtype = test_bits.DTYPES[name]
        for leaves in test_bits.cases.exact_ties(np.random.default_rng(1), dtype, 10):
            check(Case(leaves, ["contiguous"] * 2, math.inf))


def check_midpoints() -> None:
    for leaves in test_bits.beyond_doubt("float32"):
        check(Case(leaves, ["contiguous"] * len(leaves), math.inf))


def check_overflowing_norm() -> None:
    check(simple(np.full(4, 3e38, np.float32), clip_norm=1.0))


def check_tiny_factor() -> None:
    check(simple(np.float64([1e300, 1e-300]), clip_norm=5e-324))


def check_a_kept_signalling_nan() -> None:
    values = np.array([0x7FA00000, 0x3F800000], np.uint32).view(np.float32)
    check(simple(values, clip_norm=1.0, use_norm=1.0))


def check_at_the_limit() -> None:
    test_bits.check_at_limits([np.float64([3, 4])])


def check_nan_policy() -> None:
    check(simple(np.float32([np.nan, 1])))


def check_fortran_order() -> None:
    check(Case([np.ones((2, 3))], ["fortran"], math.inf))


def check_duplicate_rows() -> None:
    test_spec.check_sparse(test_spec.with_duplicates(np.float32), 0.7)


def check_flush_to_zero() -> None:
    for case, wanted in test_spec.delicate():
        with flush_to_zero():
            found = test_spec.outcomes(case)
        test_spec.assert_outcomes(found, case, wanted)


MUTATIONS: dict[str, tuple[Any, str, Any, Callable[[], None]]] = {
    "factor one ulp up": (decide, "factor", factor_one_ulp_up, check_random_float64),
    "factor one ulp of float32 up": (
        decide,
        "factor",
        factor_one_single_ulp_up,
        check_random_float32,
    ),
    "eps added to the norm": (decide, "factor", factor_with_eps, check_random_float64),
    "factor in float32": (decide, "factor", factor_in_single_precision, check_random_float64),
    "factor as a float64": (
        decide,
        "factor",
        factor_with_the_limit_of_float64,
        check_tiny_factor,
    ),
    "total one unit up": (host_leaves, "total_of", total_one_unit_up, check_ties),
    "ties away from zero": (exact, "root", root_with_ties_away, check_ties),
    "root rounded twice": (exact, "root", root_rounded_twice, check_midpoints),
    "certificate without a bound": (exact, "_BOUND", 0.0, check_midpoints),
    "norm with the limit of its dtype": (
        Leaves,
        "measure",
        measure_with_the_limit_of_the_dtype,
        check_overflowing_norm,
    ),
    "always multiply": (held, "decide", decide_to_multiply_by_one, check_a_kept_signalling_nan),
    "kept a little above the limit": (
        held,
        "decide",
        decide_to_keep_at_nearly_the_limit,
        check_at_the_limit,
    ),
    "zero for NaN": (held, "decide", decide_to_fill_with_zero, check_nan_policy),
    "copies in C order": (Leaves, "copied", copies_in_c_order, check_fortran_order),
    "rows not merged": (backend, "merged_rows", lambda *_: None, check_duplicate_rows),
    "the host's settings kept": (
        _clip,
        "ieee_arithmetic",
        contextlib.nullcontext,
        check_flush_to_zero,
    ),
    "a limit of any sign": (
        held,
        "check_clip_norm",
        lambda limit, *_: float(limit),
        partial(test_spec.test_a_clip_norm_that_is_not_above_zero, -1, clip_by_global_norm),
    ),
    "true is a number": (
        decide,
        "real_number",
        lambda _, value: float(value),
        partial(test_spec.test_a_wrong_clip_norm, True, TypeError, NO_NUMBER, clip_by_global_norm),
    ),
    "a given norm of any sign": (
        held,
        "check_use_norm",
        lambda norm, *_: Scaled.of(norm),
        partial(test_spec.test_a_use_norm_below_zero, -1),
    ),
    "a given norm in single precision": (
        held,
        "check_use_norm",
        lambda norm, *_: Scaled.of(float(np.float32(norm))),
        test_spec.test_a_use_norm_is_returned_in_the_norms_dtype_and_scaled_by_in_full,
    ),
    "any policy": (
        _clip,
        "check_policy",
        lambda _: None,
        partial(test_spec.test_an_unknown_policy, "NAN"),
    ),
    "offenders without names": (
        held.Clip,
        "_offenders",
        lambda *_, **__: "the global norm is nan",
        test_spec.test_raise_names_each_offending_leaf_with_its_counts,
    ),
    "a group left out": (
        backend,
        "workers",
        lambda *_: None,
        partial(test_spec.test_a_group_is_refused_not_ignored, clip_by_global_norm),
    ),
    "the norm always float32": (
        Leaves,
        "scalar",
        lambda _, norm, **__: np.float32(float(norm)),
        partial(test_spec.test_the_norm_is_float64_with_a_wide_leaf_else_float32, "float64"),
    ),
    "inputs handed back": (
        Leaves,
        "copied",
        lambda leaves: leaves.values,
        test_spec.test_outputs_share_no_memory_with_inputs_even_where_nothing_is_clipped,
    ),
    "an array listed twice scaled twice": (
        cpu,
        "take",
        take_as_if_only_to_read,
        partial(
            test_spec.test_an_array_listed_twice_counts_once_and_is_scaled_once_in_place, "float32"
        ),
    ),
    "read-only arrays written": (
        cpu,
        "take",
        take_as_if_only_to_read,
        partial(test_spec.test_read_only_arrays_work_but_not_in_place, "float32"),
    ),
    "any index of slices": (
        backend,
        "check_rows",
        lambda *_: None,
        test_spec.test_a_negative_index_is_out_of_range_of_an_unknown_shape_too,
    ),
    "any index of SciPy": (
        backend,
        "_check_scipy_indices",
        lambda *_: None,
        partial(test_spec.test_an_index_out_of_range_of_a_scipy_array, "coo"),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_seen(name: str) -> None:
    module, attribute, mutated, noticing = MUTATIONS[name]
    if noticing is check_flush_to_zero and not HAS_MXCSR:
        pytest.skip("only x86-64 Linux: the layout of fenv_t is known")
    noticing()
    seen = (AssertionError, pytest.fail.Exception)  # the latter where an error did not come
    with mock.patch.object(module, attribute, mutated), pytest.raises(seen):
        noticing()


# ---- mutations of the C code ----

C_MUTATIONS = {
    "a wider window for float32": ("exact.c", "F32_SPREAD = 26", "F32_SPREAD = 60"),
    "a wider window for float64": ("exact.c", "F64_SPREAD = 22", "F64_SPREAD = 40"),
    "no carry": ("exact.c", "words[j + 1] += up;", ""),
    "no low part": (
        "sums.c",
        "sum->low += (sum->high - (high - part)) + (block - part);",
        "(void)part;",
    ),
    "a wrong low part": ("sums.c", "+ (block - part);", "- (block - part);"),
    "blocks across chunks": (
        "walk.h",
        "if (length > walk->end - walk->at) length = walk->end - walk->at;",
        "",
    ),
    "no tail": ("cpu_blocks.h", "i < n; i++", "i < (n & ~1); i++"),
    "bfloat16 ties away": ("bits.h", "bits + 0x7fff + (bits >> 16 & 1)", "bits + 0x8000"),
    "float16 ties away": ("bits.h", "+ 0xfff + (magnitude >> 13 & 1)", "+ 0x1000"),
    "bytes not swapped": ("walk.c", "leaf->swap ? size - 1 - b : b", "b"),
    "a stream without its end": ("scale.c", "memcpy(to + head, from + head, bytes - head);", ""),
    "the norm of all in the first": ("sums.c", "&sums[step * walk.leaf]", "&sums[0]"),
    "all by the first factor": ("scale.c", "&factors[step * walk.leaf]", "&factors[0]"),
    "norms of one share": ("leaves.c", "(&sums[i], shares, count)", "(&sums[i], 1, count)"),
    "norms that no sum proves": (
        "leaves.c",
        "!certified_root(&sum, 1, root)",
        "certified_root(&sum, 1, root) > 1",
    ),
    "a factor near 1 taken for 1": ("scale.c", "factor->wide == 1", "factor->narrow == 1"),
    "scaled twice": ("overlap.c", "leaves[place->leaf].size = 0;", ";"),
    "inf counted as NaN": ("exact.c", "+= magnitude > infinite;", "+= magnitude >= infinite;"),
    "a number on the edge left out": ("cpu_blocks.h", "magnitude >= from", "magnitude > from"),
    "a bfloat16 in the place of its neighbour": (
        "cpu_blocks.h",
        "low >> 16 | (high & 0xffff0000)",
        "high >> 16 | (low & 0xffff0000)",
    ),
    "the odd bfloat16 left out": ("cpu_blocks.h", "if (n % 2) out[n - 1]", "if (0) out[n - 1]"),
    "half of a bfloat16 pair left out": (
        "cpu_blocks.h",
        "sums[1] = SQUARES_ADD(high, sums[1]);",
        "(void)high;",
    ),
    "sums left out": ("cpu_blocks.h", "k = NAME(SUMS) / 2; k; k /= 2", "k = 2; k; k /= 2"),
    "a tail of float64 left out": (
        "cpu_blocks.h",
        "i < LANES_F64 && whole < n; i += STEP",
        "i < STEP && whole < n; i += STEP",
    ),
    "offsets of a tail not counted": (
        "exact.c",
        "(n + LANES_F64 - 1) / LANES_F64 * (LANES_F64 / STEPS_F64)",
        "n / STEPS_F64",
    ),
    "the low part of a square left out": ("cpu_blocks.h", " - h2[j]) + low[j];", " - h2[j]);"),
    "a power of two of the exponent below": (
        "exact.c",
        "highest - F64_SPREAD + 1",
        "highest - F64_SPREAD",
    ),
    "a zero taken for the smallest": (
        "cpu_blocks.h",
        "SMALLER((NAME(u32s))(magnitude - 1)",
        "SMALLER((NAME(u32s))(magnitude)",
    ),
    "the largest by half of its bits": (
        "exact.c",
        "seen.top >> 32 >= bits_of_double(total->largest) >> 32",
        "seen.top >> 32 > bits_of_double(total->largest) >> 32",
    ),
    "a power of two left out": ("scale.c", "blocks->scale_f64(out, n, factor->shift, out);", ""),
}

# What the kernel's own trial, when it is loaded, is not there to see: how memory is walked, and one
# number in a billion.
UNTRIED = {
    "blocks across chunks",
    "bytes not swapped",
    "a stream without its end",
    "scaled twice",
    "a number on the edge left out",
    "a power of two of the exponent below",
    "the largest by half of its bits",
    "the norm of all in the first",
    "all by the first factor",
    "norms of one share",
    "norms that no sum proves",
    "a factor near 1 taken for 1",
}


# The trial's tail is longer than a step of avx2, and shorter than one of avx512.
TRIED_BY_SOME = {"a tail of float64 left out"}


# Of what XLA calls, which no trial tries.
XLA_MUTATIONS = {
    "an example left out": ("xla_sum.c", "i += ROWS;", "i += ROWS + 1;"),
    "a sum rounded twice": ("xla_sum.c", "odd[i] = odd_of(sums[i])", "odd[i] = (float)sums[i]"),
    "products not rounded": (
        "cpu_blocks.h",
        "(double)(x[row][i] * c[row])",
        "(double)x[row][i] * c[row]",
    ),
    "a block of the next leaf": (
        "xla_sum.c",
        ">= blocks_of(job, &job->to[leaf])",
        "> blocks_of(job, &job->to[leaf])",
    ),
    "the first example's norm": ("xla.c", "leaves[i].data += member *", "leaves[i].data += 0 *"),
    "examples that no thread took": ("xla.c", "end = begin + members->at_once", "end = begin + 1"),
}


def outcome(library: Path, check: str = "mutant.check_all") -> Any:
    return run_python(f"import mutant; mutant.main(sys.argv[1], {check})", str(library))


@pytest.mark.parametrize(
    "check",
    [
        pytest.param("mutant.check_all", marks=pytest.mark.slow),
        pytest.param("mutant.check_what_xla_calls", marks=pytest.mark.long),
    ],
)
def test_the_kernel_itself_passes(check: str, tmp_path: Path) -> None:
    done = outcome(build(tmp_path), check)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "trial: None\n"


# One of a sum, of a rounding, of a walk through memory and of what the binding does.
SOME = ("a wrong low part", "scaled twice")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SOME else pytest.mark.long)
        for name in C_MUTATIONS
    ],
)
def test_a_mutation_of_the_kernel_is_seen(name: str, tmp_path: Path) -> None:
    done = outcome(build(tmp_path, change=C_MUTATIONS[name]))
    assert done.returncode == mutant.SEEN, done.stderr
    if name not in TRIED_BY_SOME:
        assert done.stdout.startswith("trial: None\n") is (name in UNTRIED)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if place else pytest.mark.slow)
        for place, name in enumerate(XLA_MUTATIONS)
    ],
)
def test_a_mutation_of_what_xla_calls_is_seen(name: str, tmp_path: Path) -> None:
    pytest.importorskip("optax")
    done = outcome(build(tmp_path, change=XLA_MUTATIONS[name]), "mutant.check_what_xla_calls")
    # One that writes where it should not may end the process: that is seen, too.
    assert done.returncode == mutant.SEEN or done.returncode < 0, done.stderr
    assert done.stdout.startswith("trial: None\n")
