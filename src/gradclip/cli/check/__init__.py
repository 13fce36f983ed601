"""Compare norms and clipped values with exact arithmetic, on lists that are hard to get right.

Every installed backend of gradclip, and beside them other libraries where they are installed.
The exit status is 1 if a value of gradclip's own is not the correctly rounded one; what the other
libraries get wrong is shown and changes nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradclip import IndexedSlices
from gradclip.cli._console import need_extra, print_json, print_table, progress
from gradclip.cli.check import referee
from gradclip.cli.check.referee import Array, Leaf, Truth
from gradclip.cli.check.systems import Clip, RefusedError, System, installed

EXAMPLE = "gradclip check --large"

LEGEND = """\
  0        the norm is the true one, rounded once to its dtype
  +12 ulp  how far off it is, in units of its last place, or in percent
  x1.0500  the clipped values have 1.05 times the limit as their true norm
  changed  nothing had to be clipped, and yet bits differ
  zeroed, NaN, inf: what became of finite values
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gradclip check``."""
    parser.add_argument(
        "--large", action="store_true", help="2^27 values in the longest list, not 2^24"
    )


def run(args: argparse.Namespace) -> int:
    """Check every system on every list."""
    lists = hard_lists(27 if args.large else 24)
    found, missing = installed()
    results: list[Result] = []
    with progress("checking", len(lists) * len(found)) as advance:
        for hard in lists:
            leaves = hard.make()
            right = referee.truth(leaves, hard.clip_norm)
            for system in found:
                verdicts = [_judge(right, clip, leaves, hard.clip_norm) for clip in system.clips]
                worst = min(verdicts, key=lambda verdict: verdict.exact)
                results.append(Result(hard.name, system, worst))
                advance(1)
    wrong = [result for result in results if result.system.ours and not result.verdict.exact]
    if args.json:
        plain = [
            {"list": name, "system": system.name, "ours": system.ours, **verdict._asdict()}
            for name, system, verdict in results
        ]
        print_json({"exact": not wrong, "not_installed": missing, "results": plain})
    else:
        _print(results, found, missing, wrong)
    return 1 if wrong else 0


def _print(
    results: Sequence[Result],
    found: Sequence[System],
    missing: Sequence[str],
    wrong: Sequence[Result],
) -> None:
    columns = ["list", *(system.name.replace(" ", "\n") for system in found)]
    print_table("error of the norm, and what became of the values", *_stacked(columns, results))
    print(LEGEND)
    for system in found:
        refused = [
            f"{name} ({verdict.refused})"
            for name, of, verdict in results
            if of is system and verdict.refused
        ]
        print(f"{system.name}: {system.what}", *(f"  refused {name}" for name in refused), sep="\n")
    for name in missing:
        print(f"not to be had here: {name}")
    for name, system, verdict in wrong:
        print(f"NOT EXACT: {system.name}, {name}: {verdict.fate}, norm {verdict.norm!r}")
    if not wrong:
        print("gradclip is exact on every list")


def _stacked(
    columns: Sequence[str], results: Sequence[Result]
) -> tuple[list[str], list[list[str]]]:
    """The table with cells of two words on two lines, so that it fits 80 columns."""
    rows: dict[str, list[str]] = {}
    for name, _, verdict in results:
        rows.setdefault(name, [name]).append(verdict.cell)
    lines: list[list[str]] = []
    for row in (columns, *rows.values()):
        first, rest = zip(*(cell.partition("\n")[::2] for cell in row), strict=True)
        lines += [[*first], [*rest]] if any(rest) else [[*first]]
    return lines[0], lines[1:]


class HardList(NamedTuple):
    """A list of leaves, always the same, and the limit to clip it to."""

    name: str
    clip_norm: float
    make: Callable[[], list[Leaf]]


def hard_lists(log2_size: int) -> list[HardList]:
    """The lists, the longest with ``2**log2_size`` values; limits that every dtype holds."""
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise need_extra("ml_dtypes") from None
    half, single, double = np.float16, np.float32, np.float64

    def array(dtype: Any, *values: float) -> Array:
        return np.array(values, dtype)

    def normal(size: int, dtype: Any = single) -> Array:
        return np.random.default_rng(size).standard_normal(size).astype(dtype)

    def lognormal() -> Array:
        return np.random.default_rng(1).lognormal(0, 8, 10**5).astype(single)

    def rows() -> IndexedSlices:
        values = np.arange(12, dtype=single).reshape(6, 2)
        return IndexedSlices(values, np.array([7, 2, 7, 7, 2, 0]), (9, 2))

    # The squares add up to that of the midpoint of two neighbours: of 1 and 1 + 2^-23, and of
    # 1 and 1 + 2^-52.
    tie, wide_tie = [2.0**-12, 1, 2.0**-24, 2.0**-12], [2.0**-26, 1, 2.0**-53, 2.0**-26]
    return [
        HardList("3-4-5", 1, lambda: [array(single, 3), array(single, 4)]),
        HardList("3-4-5, limit 5", 5, lambda: [array(single, 3), array(single, 4)]),
        HardList("nothing to clip", 41, lambda: [normal(1000)]),
        HardList("zeros", 1, lambda: [np.zeros(1000, single)]),
        HardList(f"2^{log2_size} of 1.1", 1, lambda: [np.full(2**log2_size, 1.1, single)]),
        HardList("10^6 normal", 1, lambda: [normal(10**6)]),
        HardList("10^5 lognormal", 1, lambda: [lognormal()]),
        HardList("4096, 2^16 of 0.5", 1, lambda: [array(single, 4096, *2**16 * [0.5])]),
        HardList("a tie", 0.5, lambda: [array(single, *tie)]),
        HardList("just above a tie", 0.5, lambda: [array(single, *tie, 2.0**-60)]),
        HardList("[1e20, 1e20]", 1, lambda: [array(single, 1e20, 1e20)]),
        HardList("[1e30, 1e30]", 1, lambda: [array(single, 1e30, 1e30)]),
        HardList("norm over 3.4e38", 1, lambda: [np.full(9, 3e38, single)]),
        HardList("3 of 1e-30", 2.0**-104, lambda: [np.full(3, 1e-30, single)]),
        HardList("subnormals", 2.0**-130, lambda: [np.full(1000, 1e-40, single)]),
        HardList("fp16 [300, 300]", 1, lambda: [array(half, 300, 300)]),
        HardList("fp16 10^5 normal", 1, lambda: [normal(10**5, half)]),
        HardList("bf16 500 x 256", 1, lambda: [np.full(256, 1.1, bfloat16) for _ in range(500)]),
        HardList("bf16 2^20 of 1.1", 1, lambda: [np.full(2**20, 1.1, bfloat16)]),
        HardList("bf16 10^5 normal", 1, lambda: [normal(10**5, bfloat16)]),
        HardList("fp64 2 of 1e200", 1, lambda: [array(double, 1e200, 1e200)]),
        HardList("fp64 a tie", 0.5, lambda: [array(double, *wide_tie)]),
        HardList("fp64 above a tie", 0.5, lambda: [array(double, *wide_tie, 2.0**-90)]),
        HardList("fp16, bf16, fp32", 1, lambda: [normal(99, t) for t in (half, bfloat16, single)]),
        HardList("complex64", 1, lambda: [normal(2000).view(np.complex64)]),
        HardList("rows listed twice", 1, lambda: [rows(), array(single, 3, 4)]),
    ]


class Verdict(NamedTuple):
    """How one system did on one list."""

    norm: float
    ulp: float
    relative: float
    fate: str
    exact: bool  # the norm in gradclip's dtype and every value, bit for bit

    @property
    def cell(self) -> str:
        """For the table."""
        if self.refused:
            return "refused"
        if self.fate in ("NaN", "inf", "zeroed"):
            return self.fate
        off = f"{self.ulp:+.0f} ulp" if self.ulp else "0"
        if abs(self.relative) >= 1e-3:
            off = f"{100 * self.relative:+.3g} %"
        return off if self.fate == "ok" else f"{off}\n{self.fate}"

    @property
    def refused(self) -> str:
        """The exception that the system raised, or nothing."""
        return self.fate.partition("refused: ")[2]


def _judge(right: Truth, clip: Clip, leaves: list[Leaf], clip_norm: float) -> Verdict:
    try:
        norm, outputs = clip(leaves, clip_norm)
    except RefusedError as error:
        return Verdict(math.nan, math.nan, math.nan, f"refused: {error}", False)
    ulp, relative = referee.error(norm, right.square)
    same = referee.same_bits([referee.values(leaf) for leaf in outputs], right.outputs)
    exact = same and ulp == 0 and norm.dtype == right.norm_dtype
    return Verdict(float(norm), ulp, relative, "ok" if same else _fate(right, outputs), exact)


def _fate(right: Truth, outputs: Sequence[Leaf]) -> str:
    """What became of finite values that are not bit for bit as they should be."""
    arrays = [referee.values(leaf) for leaf in outputs]
    if any(np.isnan(array).any() for array in arrays):
        return "NaN"
    if any(np.isinf(array).any() for array in arrays):
        return "inf"
    if not any(array.any() for array in arrays):
        return "zeroed"
    if not right.clipped:
        return "changed"
    # Rounding each value can move the norm too: no more than where all is right.
    ratio = referee.norm_over_limit(right.limit, outputs)
    unavoidable = abs(referee.norm_over_limit(right.limit, right.outputs) - 1)
    return f"x{ratio:.4f}" if abs(ratio - 1) > unavoidable + 5e-5 else "ok"


class Result(NamedTuple):
    """One cell of the table."""

    list_name: str
    system: System
    verdict: Verdict
