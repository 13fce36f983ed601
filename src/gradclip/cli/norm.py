"""Print the norm of each tensor in some files, and the global norm of all of them together.

FILE is .npy, .npz, .safetensors, what torch.save has written (.pt, .pth, .bin, .ckpt), the index of
a model in several such files, or a folder: its index, or else the .safetensors files in it, or else
all such files. Each is read once, whatever its names, and in pieces, so it may be larger than
memory. Norms are correctly rounded: to float64 if a tensor is float64 or complex128, else to
float32. "share" is a tensor's part of the square of the global norm, "largest" the largest finite
|x|. Tensors of integers or text are listed but not counted; nor are sparse and quantised ones, nor
|V2, as which NumPy saves bfloat16 to .npy and .npz. Tensors in dicts and lists of a checkpoint are
named by the keys that lead to them, joined by dots, and those that share memory, as tied weights
do, count each.

A file that cannot be read is named on stderr, the others are measured, and the status is 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from gradclip._clip import Survey, survey, together
from gradclip.cli._console import (
    CliError,
    note,
    print_json,
    print_table,
    printable,
    progress,
    size,
)
from gradclip.cli._files import Again, given_path, natural, open_once
from gradclip.cli._headers import Tensor
from gradclip.cli._pieces import TensorFile, UnreadableError, check_unchanged, nbytes_of

EXAMPLE = "gradclip norm gradients.npz model.safetensors.index.json"

T = TypeVar("T")

_COLUMNS = ("tensor", "dtype", "shape", "norm", "share %", "largest", "NaN", "inf")


class Measured(NamedTuple):
    """What one pass over a tensor finds, or over several."""

    survey: Survey
    largest: float  # the largest finite |x|
    nans: int  # elements of which a part is NaN
    infs: int  # other elements of which a part is inf

    @property
    def norm(self) -> np.floating[Any]:
        """The norm in its dtype."""
        norm = float(self.survey.norm)
        with np.errstate(over="ignore"):
            return np.float64(norm) if self.survey.wide else np.float32(norm)

    def __str__(self) -> str:
        return f"global norm {self.norm!s} ({self.norm.dtype})"


class Row(NamedTuple):
    """A tensor, and what was found unless it is none that gradclip measures."""

    file: Path
    tensor: Tensor
    measured: Measured | None

    @property
    def label(self) -> str:
        """The name of the tensor and of its file."""
        named = self.tensor.name != str(self.file)
        return f"{self.file}: {self.tensor.name}" if named else self.tensor.name

    @property
    def alarming(self) -> bool:
        """If an element is NaN or inf."""
        return self.measured is not None and bool(self.measured.nans + self.measured.infs)

    @property
    def size(self) -> float:
        """The norm, to sort by; -1 of what has none."""
        return -1.0 if self.measured is None else float(self.measured.survey.norm)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gradclip norm``."""
    parser.add_argument("files", nargs="+", type=given_path, metavar="FILE")
    add_choices(parser)
    parser.add_argument(
        "--only-nonfinite", action="store_true", help="show only tensors with a NaN or inf"
    )


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say which tensors are shown, and in which order."""
    parser.add_argument(
        "--sort",
        choices=("norm", "share", "name"),
        help="largest first, of all files together, what is NaN or inf before; or by name, file "
        "by file, the numbers in it by what they count (the default, without --top)",
    )
    parser.add_argument(
        "--top", type=_count, metavar="N", help="show only the first N tensors, by norm"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Measure the files."""
    files, again, unreadable = open_once(args.files)
    rows = measure(files, "measuring", unreadable)
    tell(unreadable, len(files))
    everything = combined(row.measured for row in rows if row.measured)
    shown = _shown(rows, args)
    if args.json:
        print_json(_report(rows, shown, everything, again, unreadable))
    else:
        _print(rows, shown, everything, by_file=not by_size(args))
    return 1 if unreadable else 0


def tell(unreadable: Sequence[UnreadableError], readable: int) -> None:
    """Name on stderr what could not be read.

    Raises:
        UnreadableError: there is nothing else.
    """
    for error in unreadable[: None if readable else -1]:
        note(str(error))
    if unreadable and not readable:
        raise unreadable[-1]


def measure(
    files: list[TensorFile], label: str, unreadable: list[UnreadableError] | None = None
) -> list[Row]:
    """Read every tensor once.

    Where there is a list for it, a file that cannot be read goes from ``files`` into that.

    Raises:
        CliError: GRADCLIP_NUM_THREADS is no number; or a file is damaged or changes.
    """
    rows = []
    with progress(label, nbytes_of(files)) as advance:
        for file in [*files]:
            try:
                rows += _measured_file(file, advance)
            except UnreadableError as error:
                if unreadable is None:
                    raise
                unreadable.append(error)
                files.remove(file)
    return rows


def _measured_file(file: TensorFile, advance: Callable[[float], None]) -> list[Row]:
    with file.opened() as read:
        rows = [
            Row(file.path, tensor, _measure(tensor, read(tensor), advance))
            for tensor in file.tensors
        ]
    check_unchanged([file])
    return sorted(rows, key=lambda row: natural(row.tensor.name))


def _shown(rows: Sequence[Row], args: argparse.Namespace) -> list[Row]:
    """The rows that were asked for, in the order that was."""
    kept = [row for row in rows if not args.only_nonfinite or row.alarming]
    return chosen(kept, args, lambda row: row.size)


def chosen(rows: list[T], args: argparse.Namespace, size: Callable[[T], float]) -> list[T]:
    """The first of the rows, as --top and --sort say; a NaN is larger than all."""
    if by_size(args):
        rows = sorted(rows, key=lambda row: _descending(size(row)))
    return rows[: args.top]


def by_size(args: argparse.Namespace) -> bool:
    """If the rows are sorted by what they measure, and not by file and name."""
    return args.sort in ("norm", "share") or bool(args.sort is None and args.top)


def _descending(number: float) -> tuple[bool, float]:
    return (not math.isnan(number), 0.0 if math.isnan(number) else -number)


def combined(parts: Iterable[Measured]) -> Measured:
    """What was found in all parts together."""
    found = list(parts)
    return Measured(
        together(part.survey for part in found),
        max((part.largest for part in found), default=0.0),
        sum(part.nans for part in found),
        sum(part.infs for part in found),
    )


def _measure(
    tensor: Tensor, pieces: Iterable[npt.NDArray[np.uint8]], advance: Callable[[float], None]
) -> Measured | None:
    found = [] if tensor.number is None else [measured_piece(np.empty(0, tensor.number))]
    for piece in pieces:
        if tensor.number is not None:
            found.append(measured_piece(piece.view(tensor.number)))
        advance(piece.nbytes)
    return combined(found) if found else None


def measured_piece(array: npt.NDArray[Any]) -> Measured:
    """What is found in some elements.

    Raises:
        CliError: GRADCLIP_NUM_THREADS is no number.
    """
    try:
        found = survey([array])
    except ValueError as error:  # GRADCLIP_NUM_THREADS
        raise CliError(str(error)) from None
    if array.dtype.kind != "c":
        return Measured(found, found.largest, *found.nonfinite)
    nans = infs = 0
    if found.nonfinite != (0, 0):
        is_nan = np.isnan(array)
        nans, infs = int(is_nan.sum()), int((np.isinf(array) & ~is_nan).sum())
        array = array[np.isfinite(array)]
    with np.errstate(over="ignore"):
        largest = float(np.abs(array.astype(np.complex128)).max(initial=0.0))
    return Measured(found, largest, nans, infs)


def _share(part: Measured, whole: Measured) -> float | None:
    """The part of the square of the global norm; None if that is 0, NaN or inf."""
    if whole.nans or whole.infs or not whole.survey.square:
        return None
    return part.survey.square / whole.survey.square


def _report(
    rows: Sequence[Row],
    shown: Sequence[Row],
    everything: Measured,
    again: Sequence[Again],
    unreadable: Sequence[UnreadableError],
) -> dict[str, Any]:
    return {
        **figures(everything),
        "tensors": [described(row, everything) for row in shown],
        "not_shown": len(rows) - len(shown),
        "given_again": [{"file": str(file), "same_as": str(first)} for file, first in again],
        "unreadable": [{"file": str(error.file), "reason": error.reason} for error in unreadable],
    }


def described(row: Row, everything: Measured) -> dict[str, Any]:
    """All about a tensor, for JSON."""
    return {
        "file": str(row.file),
        "name": row.tensor.name,
        "dtype": row.tensor.dtype,
        "shape": row.tensor.shape,
        "counted": row.measured is not None,
        **(figures(row.measured) if row.measured else {}),
        **({"share": _share(row.measured, everything)} if row.measured else {}),
    }


def figures(found: Measured) -> dict[str, Any]:
    """What was found, for JSON."""
    return {
        "norm": float(found.norm),
        "norm_dtype": found.norm.dtype.name,
        "largest": found.largest,
        "nan": found.nans,
        "inf": found.infs,
    }


def _print(
    rows: Sequence[Row], shown: Sequence[Row], everything: Measured, *, by_file: bool
) -> None:
    several = len({row.file for row in rows}) > 1
    cells: list[list[str]] = []
    alarming = set()
    heading = None
    for row in shown:
        single = row.tensor.name == str(row.file)
        headed = several and by_file and not single
        if headed and row.file != heading:
            heading = row.file
            cells.append([printable(str(heading))])
        if row.alarming:
            alarming.add(len(cells))
        name = row.label if several and not by_file else row.tensor.name
        cells.append([("  " if headed else "") + printable(name), *_cells(row, everything)])
    print_table("", _COLUMNS, cells, text=2, alarming=alarming)
    print(*_summary(rows, len(shown), everything), sep="\n")


def _summary(rows: Sequence[Row], shown: int, everything: Measured) -> Iterator[str]:
    if shown < len(rows):
        yield f"{shown} of {len(rows)} tensors are shown"
    yield f"{everything} of {amount([row.tensor for row in rows if row.measured])}"
    for exempt, reason in ((True, "no floating point"), (False, "a dtype gradclip cannot read")):
        others = [row.tensor for row in rows if not row.measured and row.tensor.exempt is exempt]
        if others:
            dtypes = ", ".join(sorted({printable(tensor.dtype) for tensor in others}))
            yield f"not counted: {amount(others)}, {reason} ({dtypes})"


def _cells(row: Row, everything: Measured) -> list[str]:
    """All but the name."""
    found = row.measured
    shape = "x".join(map(str, row.tensor.shape)) or "scalar"
    if found is None:
        return [printable(row.tensor.dtype), shape, *5 * ["-"]]
    share = _share(found, everything)
    return [
        row.tensor.dtype,
        shape,
        str(found.norm),
        "-" if share is None else f"{100 * share:.2f}",
        f"{found.largest:.4g}",
        str(found.nans),
        str(found.infs),
    ]


def amount(tensors: Sequence[Tensor]) -> str:
    """How many tensors of how many bytes."""
    plural = "" if len(tensors) == 1 else "s"
    return f"{len(tensors)} tensor{plural}, {size(sum(tensor.nbytes for tensor in tensors))}"
