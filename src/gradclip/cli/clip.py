"""Write a copy of a file, its tensors scaled down to have at most a given global norm together.

FILE is .npy, .npz, .safetensors, or the .safetensors.index.json of a model in several files, for
which OUT is a new folder. Names, dtypes, shapes and metadata stay as they are; integers and text
are carried over; with nothing to clip OUT is byte for byte FILE. FILE is read and OUT is written
in pieces, so they may be larger than memory. OUT comes to be whole or not at all: it is written
to a temporary folder beside it and renamed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np

from gradclip._clip import act_
from gradclip._decide import (
    Action,
    Fill,
    Keep,
    OnNonfinite,
    Raise,
    Scale,
    check_clip_norm,
    decide,
)
from gradclip.cli._console import CliError, print_json, printable, progress
from gradclip.cli._files import PIECE, Bytes, TensorFile, is_index, open_files
from gradclip.cli._headers import Tensor
from gradclip.cli._whole import appearing, create_like, to_disk
from gradclip.cli.norm import Measured, Row, amount, combined, measure

EXAMPLE = "gradclip clip gradients.safetensors --clip-norm 1.0 -o clipped.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gradclip clip``."""
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument(
        "--clip-norm", type=_limit, required=True, metavar="C", help="a number above 0"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    parser.add_argument(
        "--on-nonfinite",
        choices=get_args(OnNonfinite),
        default="nan",
        help="if an element is NaN or inf: fill all with NaN (the default), stop, "
        "fill all with 0, or keep all as they are",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")


def _limit(text: str) -> float:
    try:
        return check_clip_norm(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Clip a file."""
    files = open_files(args.file)
    out = Path(os.path.realpath(args.output))
    _check_output(args.file, args.output, out, args.force)
    try:
        with appearing(out) as new:
            rows = measure(files, "measuring")
            _check_dtypes(rows)
            everything = combined(row.measured for row in rows if row.measured)
            action = decide(everything.survey.norm, args.clip_norm, args.on_nonfinite)
            if isinstance(action, Raise):
                raise CliError(_offenders(rows, everything), 1)
            _write(args.file, files, new, action)
    except OSError as error:
        raise CliError(f"cannot write {args.output}: {error.strerror or error}") from None
    if args.json:
        print_json(_report(args, rows, everything, action))
    else:
        print(*_summary(args, rows, everything, action), sep="\n")
    return 0


def _check_output(source: Path, given: Path, out: Path, force: bool) -> None:
    """Raise CliError where writing would lose something."""
    if is_index(source):
        if out.exists() and not (force and out.is_dir() and not any(out.iterdir())):
            raise CliError(f"{given} exists; the folder for clipped shards must be a new one")
        return
    if out.suffix.lower() != source.suffix.lower():
        raise CliError(f"{given} must end in {source.suffix}, as {source} does")
    if out.is_dir():
        raise CliError(f"{given} is a folder")
    if out.exists() and not force:
        what = "is the input itself" if out.samefile(source) else "exists"
        raise CliError(f"{given} {what}; --force overwrites it")


def _check_dtypes(rows: Sequence[Row]) -> None:
    for row in rows:
        if not row.measured and not row.tensor.exempt:
            raise CliError(f"{row.label} is {row.tensor.dtype}, which gradclip cannot clip")


def _offenders(rows: Sequence[Row], everything: Measured) -> str:
    found = [
        f"{row.label} holds {row.measured.nans} NaN and {row.measured.infs} inf"
        for row in rows
        if row.measured and row.measured.nans + row.measured.infs
    ]
    return f"{everything}: {'; '.join(found)}; nothing is written"


def _write(source: Path, files: Sequence[TensorFile], new: Path, action: Action) -> None:
    keep = isinstance(action, Keep)
    total = sum(file.path.stat().st_size if keep else file.nbytes for file in files)
    with progress("writing", total) as advance:
        if not is_index(source):
            _write_file(files[0], new, action, advance)
            return
        new.mkdir()
        for file in files:
            _write_file(file, new / file.path.name, action, advance)
        with create_like(new / source.name, source) as target:
            target.write(source.read_bytes())
        to_disk(new / source.name)
        to_disk(new)


def _write_file(
    file: TensorFile, new: Path, action: Action, advance: Callable[[float], None]
) -> None:
    def change(tensor: Tensor, piece: Bytes) -> Bytes:
        advance(piece.nbytes)
        if tensor.number is None:
            return piece
        changed = np.array(piece)
        act_([changed.view(tensor.number)], action)
        return changed

    with create_like(new, file.path) as target:
        if isinstance(action, Keep):
            _copy(file.path, target, advance)
        else:
            file.rewrite(target, change)
    to_disk(new)


def _copy(source: Path, target: IO[bytes], advance: Callable[[float], None]) -> None:
    with source.open("rb") as stream:
        while piece := stream.read(PIECE):
            target.write(piece)
            advance(len(piece))


def _report(
    args: argparse.Namespace, rows: Sequence[Row], found: Measured, action: Action
) -> dict[str, Any]:
    factor: float | None
    match action:
        case Scale(scale):
            factor = float(scale)
        case Keep():
            factor = 1.0
        case _:
            factor = None
    return {
        "file": str(args.file),
        "output": str(args.output),
        "norm": float(found.norm),
        "norm_dtype": found.norm.dtype.name,
        "clip_norm": args.clip_norm,
        "action": type(action).__name__.lower(),
        "factor": factor,
        "clipped": sum(row.measured is not None for row in rows),
        "carried_over": sum(row.measured is None for row in rows),
    }


def _summary(
    args: argparse.Namespace, rows: Sequence[Row], found: Measured, action: Action
) -> Iterator[str]:
    match action:
        case Scale(factor):
            outcome = f"clipped to {args.clip_norm} by the factor {float(factor)}"
        case Fill(value):
            outcome = f"every element set to {value}"
        case _:
            outcome = f"nothing to clip at {args.clip_norm}"
    yield f"{found}, {outcome}"
    carried = [row.tensor for row in rows if not row.measured]
    also = f"; {amount(carried)}, carried over" if carried else ""
    clipped = [row.tensor for row in rows if row.measured]
    yield f"{printable(str(args.output))}: {amount(clipped)}{also}"
