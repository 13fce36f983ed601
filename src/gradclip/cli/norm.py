"""Print the norm of each tensor in some files, and the global norm of all of them together.

FILE is .npy, .npz, .safetensors, or the .safetensors.index.json of a model in several files, or a
folder with such an index or with one .safetensors file in it. Each is read once, whatever its
names, and in pieces, so it may be larger than memory. Norms are correctly rounded: to
float64 if a tensor is float64 or complex128, else to float32. "share" is a tensor's part of the
square of the global norm, "largest" the largest finite |x|. Tensors of integers or text are listed
but not counted; nor is |V2, as which NumPy saves bfloat16 to .npy and .npz.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradclip._clip import Survey, survey, together
from gradclip.cli._console import CliError, print_json, print_table, printable, progress, size
from gradclip.cli._files import Again, TensorFile, check_unchanged, given_path, open_once
from gradclip.cli._headers import Tensor

EXAMPLE = "gradclip norm gradients.npz model.safetensors.index.json"

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gradclip norm``."""
    parser.add_argument("files", nargs="+", type=given_path, metavar="FILE")


def run(args: argparse.Namespace) -> int:
    """Measure the files."""
    files, again = open_once(args.files)
    rows = measure(files, "measuring")
    everything = combined(row.measured for row in rows if row.measured)
    if args.json:
        print_json(_report(rows, everything, again))
    else:
        _print(rows, everything, len(files))
    return 0


def measure(files: Sequence[TensorFile], label: str) -> list[Row]:
    """Read every tensor once.

    Raises:
        CliError: a file is damaged or changes, or GRADCLIP_NUM_THREADS is no number.
    """
    rows = []
    with progress(label, sum(file.nbytes for file in files)) as advance:
        for file in files:
            for tensor, _, pieces in file.walk():
                rows.append(Row(file.path, tensor, _measure(tensor, pieces, advance)))
    check_unchanged(files)
    return rows


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
    found = [] if tensor.number is None else [_look(np.empty(0, tensor.number))]
    for piece in pieces:
        if tensor.number is not None:
            found.append(_look(piece.view(tensor.number)))
        advance(piece.nbytes)
    return combined(found) if found else None


def _look(array: npt.NDArray[Any]) -> Measured:
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


def _report(rows: Sequence[Row], everything: Measured, again: Sequence[Again]) -> dict[str, Any]:
    return {
        **figures(everything),
        "tensors": [described(row, everything) for row in rows],
        "given_again": [{"file": str(file), "same_as": str(first)} for file, first in again],
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


def _print(rows: Sequence[Row], everything: Measured, files: int) -> None:
    cells: list[list[str]] = []
    alarming = set()
    heading = None
    for row in rows:
        single = row.tensor.name == str(row.file)
        if files > 1 and not single and row.file != heading:
            heading = row.file
            cells.append([printable(str(heading))])
        if row.measured and row.measured.nans + row.measured.infs:
            alarming.add(len(cells))
        indent = "  " if files > 1 and not single else ""
        cells.append([indent + printable(row.tensor.name), *_cells(row, everything)])
    print_table("", _COLUMNS, cells, text=2, alarming=alarming)
    counted = [row.tensor for row in rows if row.measured]
    print(f"{everything} of {amount(counted)}")
    for exempt, reason in ((True, "no floating point"), (False, "a dtype gradclip cannot read")):
        others = [row.tensor for row in rows if not row.measured and row.tensor.exempt is exempt]
        if others:
            dtypes = ", ".join(sorted({printable(tensor.dtype) for tensor in others}))
            print(f"not counted: {amount(others)}, {reason} ({dtypes})")


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
