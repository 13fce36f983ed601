"""Write a copy of a file, its tensors scaled down to have at most a given global norm together.

FILE is .npy, .npz, .safetensors, what torch.save has written (.pt, .pth, .bin, .ckpt), the index of
a model in several such files, or a folder: its index, or else the .safetensors files in it, or else
all such files. Of a folder or index OUT is a new folder, of the index and its files alone. Names,
dtypes, shapes, metadata and all else in a file stay as they are; integers and text are carried
over; with nothing to clip OUT is byte for byte FILE. A NaN or inf is an error that names the
tensors, with status 1, unless --on-nonfinite says otherwise.

Tensors of a checkpoint that share memory, as tied weights do, each count in the norm and are scaled
once, whatever else lies in that memory with them. A checkpoint is loaded whole and saved anew by
torch.save, as one of the same format with its tensors on the CPU.

All others are read and written in pieces, so they may be larger than memory. OUT comes to be whole
or not at all: it is written to a temporary folder beside it and renamed. Where --force replaces a
file, OUT gets its permissions but not its owner, and its other hard links keep what they had.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from gradclip._clip import act_
from gradclip.cli._console import CliError, print_json, printable, progress
from gradclip.cli._files import given_path, is_index, located, open_files
from gradclip.cli._headers import Tensor
from gradclip.cli._pieces import Bytes, TensorFile, check_unchanged, contents, nbytes_of
from gradclip.cli._regular import other
from gradclip.cli._whole import appearing, created, to_disk
from gradclip.cli.norm import Measured, Row, amount, combined, described, figures, measure
from gradclip.core.decide import Action, Fill, Keep, Raise, Scale, check_clip_norm, decide

EXAMPLE = "gradclip clip gradients.safetensors --clip-norm 1.0 -o clipped.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gradclip clip``."""
    parser.add_argument("file", type=given_path, metavar="FILE")
    parser.add_argument(
        "--clip-norm",
        "--max-norm",
        dest="clip_norm",
        type=_limit,
        required=True,
        metavar="C",
        help="a number above 0",
    )
    parser.add_argument("-o", "--output", type=given_path, required=True, metavar="OUT")
    parser.add_argument(
        "--on-nonfinite",
        choices=("raise", "nan", "zero", "keep"),
        default="raise",
        help="if an element is NaN or inf: stop and write nothing (the default), fill all with "
        "NaN, fill all with 0, or keep all as they are",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace OUT if it is a regular file, and keep its mode",
    )


def _limit(text: str) -> float:
    try:
        return check_clip_norm(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Output(NamedTuple):
    """Where the clipped tensors go."""

    given: Path
    path: Path  # with its links followed
    folder: bool  # with the shards in it, and their index
    force: bool


def run(args: argparse.Namespace) -> int:
    """Clip a file."""
    sources = located(args.file)
    files = [file for source in sources for file in open_files(source)]
    source = sources[0]
    folder = args.file.is_dir() or is_index(source)
    out = Output(args.output, Path(os.path.realpath(args.output)), folder, args.force)
    try:
        _check_output(source, out)
        with appearing(out.path) as new:
            rows = measure(files, "measuring")
            _check_dtypes(rows)
            everything = combined(row.measured for row in rows if row.measured)
            action = decide(everything.survey.norm, args.clip_norm, args.on_nonfinite)
            if isinstance(action, Raise):
                raise CliError(_offenders(rows, everything), 1)
            _write(source, files, out, new, action)
            # Others may have written to the one or made the other since.
            check_unchanged(files)
            _check_output(source, out)
    except OSError as error:
        raise CliError(f"cannot write {args.output}: {error.strerror or error}") from None
    if args.json:
        print_json(_report(args, rows, everything, action))
    else:
        print(*_summary(args, rows, everything, action), sep="\n")
    return 0


def _check_output(source: Path, out: Output) -> None:
    """Raise CliError where writing would lose something."""
    what = other(out.path)
    if out.folder:
        if what or out.path.exists():
            raise CliError(f"{out.given} exists; the folder for clipped shards must be a new one")
        return
    if what:
        raise CliError(f"{out.given} is {what}; only regular files are replaced")
    if out.path.suffix.lower() != source.suffix.lower():
        raise CliError(f"{out.given} must end in {source.suffix}, as {source} does")
    if out.path.exists() and not out.force:
        how = "is the input itself" if out.path.samefile(source) else "exists"
        raise CliError(f"{out.given} {how}; --force overwrites it")


def _check_dtypes(rows: Sequence[Row]) -> None:
    for row in rows:
        if not row.measured and not row.tensor.exempt:
            raise CliError(
                f"{printable(row.label)} is {row.tensor.dtype}, which gradclip cannot clip"
            )


def _offenders(rows: Sequence[Row], everything: Measured) -> str:
    found = [
        f"{printable(row.label)} holds {row.measured.nans} NaN and {row.measured.infs} inf"
        for row in rows
        if row.measured and row.measured.nans + row.measured.infs
    ]
    return (
        f"{everything}: {'; '.join(found)}; nothing is written. "
        "--on-nonfinite nan, zero or keep writes a file all the same"
    )


def _write(
    source: Path, files: Sequence[TensorFile], out: Output, new: Path, action: Action
) -> None:
    keep = isinstance(action, Keep)
    total = sum(file.state.size for file in files) if keep else nbytes_of(files)
    with progress("writing", total) as advance:
        if not out.folder:
            with created(new, source, out.path if out.path.exists() else None) as target:
                _write_file(files[0], target, action, advance)
            return
        new.mkdir()
        for file in files:
            with created(new / file.path.name, file.path) as target:
                _write_file(file, target, action, advance)
        if is_index(source):
            with created(new / source.name, source) as target:
                target.writelines(contents(source))
        to_disk(new)


def _write_file(
    file: TensorFile, target: IO[bytes], action: Action, advance: Callable[[float], None]
) -> None:
    def change(tensor: Tensor, piece: Bytes) -> Bytes:
        advance(piece.nbytes)
        if tensor.number is None:
            return piece
        changed = np.array(piece)
        act_([changed.view(tensor.number)], action)
        return changed

    if not isinstance(action, Keep):
        file.rewrite(target, change)
        return
    for piece in contents(file.path):
        target.write(piece)
        advance(len(piece))


def _report(
    args: argparse.Namespace, rows: Sequence[Row], found: Measured, action: Action
) -> dict[str, Any]:
    clipped = [row.measured is not None and not isinstance(action, Keep) for row in rows]
    return {
        "file": str(args.file),
        "output": str(args.output),
        **figures(found),
        "clip_norm": args.clip_norm,
        "action": type(action).__name__.lower(),
        "factor": _factor(action),
        "fill": action.value if isinstance(action, Fill) else None,
        "clipped": sum(clipped),
        "carried_over": sum(row.measured is None for row in rows),
        "tensors": [
            {**described(row, found), "clipped": done}
            for row, done in zip(rows, clipped, strict=True)
        ],
    }


def _factor(action: Action) -> float | None:
    match action:
        case Scale(factor):
            return float(factor)
        case Keep():
            return 1.0
    return None


def _summary(
    args: argparse.Namespace, rows: Sequence[Row], found: Measured, action: Action
) -> Iterator[str]:
    match action:
        case Scale(factor):
            outcome = f"clipped to {args.clip_norm} by the factor {float(factor)}"
        case Fill(value):
            outcome = f"every element set to {value}"
        case Keep() if found.nans or found.infs:
            outcome = "every element kept as it is"
        case _:
            outcome = f"nothing to clip at {args.clip_norm}"
    yield f"{found}, {outcome}"
    carried = [row.tensor for row in rows if not row.measured]
    also = f"; {amount(carried)}, carried over" if carried else ""
    clipped = [row.tensor for row in rows if row.measured]
    yield f"{printable(str(args.output))}: {amount(clipped)}{also}"
