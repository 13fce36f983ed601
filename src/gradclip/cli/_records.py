"""Records of runs as the command line opens them: whatever is wrong with one is said in a line."""

from __future__ import annotations

from pathlib import Path

from gradclip.cli._console import CliError
from gradclip.record import History


def open_record(path: Path) -> History:
    """Read a record.

    Raises:
        CliError: there is none, or the file is none.
    """
    try:
        return History.open(path)
    except (OSError, ValueError) as error:
        raise CliError(str(error)) from None
