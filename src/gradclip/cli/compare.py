"""Print the norm of the difference of each tensor in two files, and that of all of them together.

A and B are what `gradclip norm` reads: a file, an index of shards, or a folder. Tensors of one name
are compared, whatever their order, format and dtype; of two .npy files the one tensor with the
other. The difference of two elements is that of real numbers, rounded once to float64 (complex128),
and its norm over all of them is correctly rounded to float64. "relative" is that norm over the norm
of the tensor in A, "largest" the largest finite |a - b|, "differ" how many elements do.

Two NaN in the same place do not differ, nor do two inf of one sign; a NaN in one alone makes the
norm NaN. A tensor of one dtype and the same bits in both is "same". Integers and text are only
compared bit by bit.

The status is 0 where all could be compared, whether they differ or not; 1 where a name is in one
alone, or shapes or kinds of dtype are not the same; 2 where a file cannot be read.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradclip._clip import together
from gradclip.cli._console import print_json, print_table, printable, progress
from gradclip.cli._files import given_path, located, natural, open_files
from gradclip.cli._headers import Tensor
from gradclip.cli._pieces import (
    Bytes,
    Read,
    TensorFile,
    UnreadableError,
    check_unchanged,
    in_order,
    nbytes_of,
)
from gradclip.cli.norm import Measured, add_choices, chosen, combined, measured_piece

EXAMPLE = "gradclip compare before.safetensors after.pt --top 10"

_COLUMNS = ("tensor", "dtype", "norm of A", "of A - B", "relative", "largest", "differ")
_ZERO = Measured(together([]), 0.0, 0, 0)


class Place(NamedTuple):
    """Where a tensor is."""

    file: TensorFile
    tensor: Tensor


class Difference(NamedTuple):
    """What is found where a tensor is held against another, or over several."""

    first: Measured  # the tensor in A
    apart: Measured  # the difference, in float64
    differing: int  # elements
    both_nonfinite: int  # places where both are NaN, or the same inf
    same: bool  # if dtypes and bits are the same

    @property
    def norm(self) -> float:
        """The norm of the difference."""
        return float(self.apart.survey.norm)

    @property
    def relative(self) -> float | None:
        """The norm of the difference over that of A; None where that is 0, NaN or inf."""
        of_first = float(self.first.survey.norm)
        return self.norm / of_first if of_first and math.isfinite(of_first) else None


class Row(NamedTuple):
    """A tensor that is in both, and what was found of it: of integers or text no norm."""

    name: str
    first: Tensor
    second: Tensor
    found: Difference

    @property
    def counted(self) -> bool:
        """If it has a norm."""
        return self.first.number is not None

    @property
    def size(self) -> float:
        """The norm to sort by; -1 of what has none."""
        return self.found.norm if self.counted else -1.0


class Unlike(NamedTuple):
    """A tensor that is in both and cannot be compared, and why."""

    name: str
    reason: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gradclip compare``."""
    parser.add_argument("first", type=given_path, metavar="A")
    parser.add_argument("second", type=given_path, metavar="B")
    add_choices(parser)


def run(args: argparse.Namespace) -> int:
    """Compare two files."""
    first, second = _named(args.first), _named(args.second)
    only_first, only_second = sorted_names(first, second), sorted_names(second, first)
    common = [name for name in sorted(first, key=natural) if name in second]
    unlike = [
        Unlike(name, reason)
        for name in common
        if (reason := _unlike(first[name].tensor, second[name].tensor))
    ]
    apart = {each.name for each in unlike}
    rows = _compared(first, second, [name for name in common if name not in apart])
    everything = _together([row.found for row in rows if row.counted])
    shown = chosen(rows, args, lambda row: row.size)
    missing = only_first, only_second
    if args.json:
        print_json(_report(args, rows, shown, everything, missing, unlike))
    else:
        _print(rows, shown, everything, missing, unlike)
    return 1 if only_first or only_second or unlike else 0


def sorted_names(some: dict[str, Place], others: dict[str, Place]) -> list[str]:
    """The names that are not among the others."""
    return sorted(some.keys() - others.keys(), key=natural)


# ---- which tensors ----


def _named(path: Path) -> dict[str, Place]:
    """Every tensor of a side by its name; in a folder of several files with that of its file."""
    sources = located(path)
    found: dict[str, Place] = {}
    for source in sources:
        for file in open_files(source):
            for tensor in file.tensors:
                name = _name(tensor, file, alone=len(sources) == 1)
                if name in found:
                    raise UnreadableError(path, f"has two tensors named {printable(name)}")
                found[name] = Place(file, tensor)
    return found


def _name(tensor: Tensor, file: TensorFile, *, alone: bool) -> str:
    if tensor.name == str(file.path):
        return "(the tensor)" if alone else file.path.name
    return tensor.name if alone else f"{file.path.name}: {tensor.name}"


def _unlike(first: Tensor, second: Tensor) -> str | None:
    """Why two tensors cannot be compared."""
    for tensor in (first, second):
        if tensor.number is None and not tensor.exempt:
            return f"is {tensor.dtype}, which gradclip cannot read"
    if first.shape != second.shape:
        return f"has shape {_shape(first)} in A and {_shape(second)} in B"
    exact = first.exempt or second.exempt
    if exact and (first.dtype, first.nbytes) != (second.dtype, second.nbytes):
        return f"is {first.dtype} in A and {second.dtype} in B"
    return None


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


# ---- the difference ----


def _compared(first: dict[str, Place], second: dict[str, Place], names: Sequence[str]) -> list[Row]:
    places = [*first.values(), *second.values()]
    files = [*{id(place.file): place.file for place in places}.values()]
    rows = []
    with ExitStack() as stack, progress("comparing", nbytes_of(files)) as advance:
        reads = {id(file): stack.enter_context(file.opened()) for file in files}
        for name in names:
            sides = [_elements(side[name], reads, advance) for side in (first, second)]
            tensors = first[name].tensor, second[name].tensor
            rows.append(Row(name, *tensors, _difference(*tensors, *sides)))
    check_unchanged(files)
    return rows


def _elements(
    place: Place, reads: dict[int, Read], advance: Callable[[float], None]
) -> Iterator[Bytes]:
    for piece in in_order(place.tensor, reads[id(place.file)](place.tensor)):
        advance(piece.nbytes)
        yield piece


def _difference(
    first: Tensor, second: Tensor, of_first: Iterator[Bytes], of_second: Iterator[Bytes]
) -> Difference:
    one_dtype = first.number == second.number and first.dtype == second.dtype
    parts = [_nothing(first, same=one_dtype)]
    for a, b in _pairs(of_first, of_second, _itemsize(first), _itemsize(second)):
        if one_dtype and np.array_equal(a, b):
            parts.append(_same(a, first))
        elif first.number is None or second.number is None:
            parts.append(Difference(_ZERO, _ZERO, _unequal(a, b, first), 0, same=False))
        else:
            parts.append(_apart(a.view(first.number), b.view(second.number)))
    return _together(parts)


def _same(piece: Bytes, tensor: Tensor) -> Difference:
    """What is found where bits are the same, with no need to take them apart."""
    if tensor.number is None:
        return _nothing(tensor, same=True)
    found = measured_piece(piece.view(tensor.number))
    return Difference(found, _ZERO, 0, found.nans + found.infs, same=True)


def _nothing(tensor: Tensor, *, same: bool) -> Difference:
    empty = _ZERO if tensor.number is None else measured_piece(np.empty(0, tensor.number))
    return Difference(empty, measured_piece(np.empty(0)), 0, 0, same)


def _itemsize(tensor: Tensor) -> int:
    if tensor.number is not None:
        return tensor.number.itemsize
    return max(1, tensor.nbytes // max(1, math.prod(tensor.shape)))


def _pairs(
    of_first: Iterator[Bytes], of_second: Iterator[Bytes], size_a: int, size_b: int
) -> Iterator[tuple[Bytes, Bytes]]:
    """Pieces of as many elements each, though those that are read may be of other lengths."""
    a = b = np.empty(0, np.uint8)
    while True:
        a, b = _with_one(a, of_first, size_a), _with_one(b, of_second, size_b)
        count = min(a.size // size_a, b.size // size_b)
        if not count:
            return
        yield a[: count * size_a], b[: count * size_b]
        a, b = a[count * size_a :], b[count * size_b :]


def _with_one(left: Bytes, more: Iterator[Bytes], size: int) -> Bytes:
    """What is left, and as much more as it takes to hold an element, if there is that much."""
    parts = [left] if left.size else []
    while sum(part.size for part in parts) < size and (piece := next(more, None)) is not None:
        parts.append(piece)
    return parts[0] if len(parts) == 1 else np.concatenate([left[:0], *parts])


def _unequal(a: Bytes, b: Bytes, tensor: Tensor) -> int:
    """How many elements have other bits."""
    return int((a != b).reshape(-1, _itemsize(tensor)).any(axis=1).sum())


def _apart(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Difference:
    wide = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
    x, y = a.astype(wide), b.astype(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        difference = x - y
    equal = x == y
    both = (np.isnan(x) & np.isnan(y)) | (equal & ~np.isfinite(x))
    difference[both] = 0
    differing = int(x.size - np.count_nonzero(equal | both))
    return Difference(
        measured_piece(a), measured_piece(difference), differing, int(both.sum()), same=False
    )


def _together(parts: Sequence[Difference]) -> Difference:
    """What was found in all parts."""
    return Difference(
        combined(part.first for part in parts),
        combined([measured_piece(np.empty(0)), *(part.apart for part in parts)]),
        sum(part.differing for part in parts),
        sum(part.both_nonfinite for part in parts),
        all(part.same for part in parts),
    )


# ---- the report ----


def _report(
    args: argparse.Namespace,
    rows: Sequence[Row],
    shown: Sequence[Row],
    everything: Difference,
    missing: tuple[list[str], list[str]],
    unlike: Sequence[Unlike],
) -> dict[str, Any]:
    return {
        "a": str(args.first),
        "b": str(args.second),
        **_figures(everything),
        "same": all(row.found.same for row in rows) and not any((*missing, unlike)),
        "tensors": [_described(row, everything) for row in shown],
        "not_shown": len(rows) - len(shown),
        "only_in_a": missing[0],
        "only_in_b": missing[1],
        "not_compared": [each._asdict() for each in unlike],
    }


def _described(row: Row, everything: Difference) -> dict[str, Any]:
    figures: dict[str, Any] = {"differ": row.found.differing}
    if row.counted:
        figures = {**_figures(row.found), "share": _share(row.found, everything)}
    return {
        "name": row.name,
        "dtype_a": row.first.dtype,
        "dtype_b": row.second.dtype,
        "shape": row.first.shape,
        "counted": row.counted,
        "same": row.found.same,
        **figures,
    }


def _figures(found: Difference) -> dict[str, Any]:
    return {
        "norm": found.norm,
        "norm_a": float(found.first.norm),
        "relative": found.relative,
        "largest": found.apart.largest,
        "differ": found.differing,
        "both_nonfinite": found.both_nonfinite,
    }


def _share(part: Difference, whole: Difference) -> float | None:
    square = whole.apart.survey.square
    if not square or not math.isfinite(whole.norm):
        return None
    return part.apart.survey.square / square


def _print(
    rows: Sequence[Row],
    shown: Sequence[Row],
    everything: Difference,
    missing: tuple[list[str], list[str]],
    unlike: Sequence[Unlike],
) -> None:
    alarming = {at for at, row in enumerate(shown) if not math.isfinite(row.found.norm)}
    print_table("", _COLUMNS, [_cells(row) for row in shown], text=2, alarming=alarming)
    if len(shown) < len(rows):
        print(f"{len(shown)} of {len(rows)} tensors are shown")
    same = sum(row.found.same for row in rows)
    relative = "" if everything.relative is None else f", relative {everything.relative:.4g}"
    print(f"norm of the difference {everything.norm} (float64){relative}")
    print(f"{same} of {len(rows)} tensors are the same, bit for bit")
    for side, names in zip("AB", missing, strict=True):
        if names:
            print(f"only in {side}: {', '.join(map(printable, names))}")
    for name, reason in unlike:
        print(f"not compared: {printable(name)} {printable(reason)}")


def _cells(row: Row) -> list[str]:
    dtype = row.first.dtype
    if row.second.dtype != dtype:
        dtype = f"{dtype}, {row.second.dtype}"
    found = row.found
    verdict = "same" if found.same else str(found.differing)
    if not row.counted:
        return [printable(row.name), printable(dtype), *4 * ["-"], verdict]
    return [
        printable(row.name),
        dtype,
        str(found.first.norm),
        f"{found.norm:.6g}",
        "-" if found.relative is None else f"{found.relative:.4g}",
        f"{found.apart.largest:.4g}",
        verdict,
    ]
