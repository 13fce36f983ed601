"""What the pictures of `gradclip demo` share: a blank figure, colours, the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gradclip.cli._console import CliError, need_extra
from gradclip.cli._regular import other
from gradclip.cli._whole import appearing, to_disk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's blue and vermilion, which colour-blind readers can tell apart.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "0.4"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Hand out a new file, which takes the place of ``path`` at the end or vanishes."""
    if path.suffix.lower() != ".png":
        raise CliError(f"--out {path}: name a file that ends in .png")
    if what := other(path):
        raise CliError(f"--out {path} is {what}; only regular files are replaced")
    try:
        with appearing(Path(os.path.realpath(path))) as new:
            yield new
            to_disk(new)
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror or error}") from None


def blank_figure(height: float) -> Figure:
    """A figure of that height, in inches.

    Raises:
        CliError: there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise need_extra("matplotlib") from None
    return Figure(figsize=(9, height), dpi=150, layout="constrained")
