"""The figures of a whole run."""

from __future__ import annotations

import datetime
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradclip.cli._console import printable
from gradclip.cli.report.buckets import Buckets
from gradclip.cli.report.words import counted, known

if TYPE_CHECKING:
    from gradclip.record import History


class Facts(NamedTuple):
    """How long a run was, how large its norms, how many of its steps were clipped."""

    name: str
    first: int
    last: int
    steps: int
    begun: float  # seconds since 1970
    ended: float
    tensors: int
    tensor_steps: int
    median: float
    largest: float
    clipped: int
    skipped: int
    nonfinite: int
    bucket: int  # steps that are drawn together

    @property
    def when(self) -> str:
        """The steps, the time they took and the tensors, in a line."""
        begun = datetime.datetime.fromtimestamp(self.begun).strftime("%Y-%m-%d %H:%M")
        took = str(datetime.timedelta(seconds=round(self.ended - self.begun)))
        written = counted(self.tensor_steps, "step")
        tensors = f"{counted(self.tensors, 'tensor')}, written in {written}"
        return (
            f"Steps {self.first:,} to {self.last:,}, from {begun} on, in {took}; "
            f"{tensors if self.tensors else 'no tensors'}."
        )

    def plain(self) -> dict[str, Any]:
        """The figures for JSON."""
        shown = self._asdict()
        del shown["bucket"]
        shown["share_clipped"] = self.clipped / self.steps
        shown["median"], shown["largest"] = known(self.median), known(self.largest)
        return shown


def gather(name: str, history: History) -> Facts:
    """Gather the figures of a record that has steps."""
    finite = history.norm[np.isfinite(history.norm)]
    return Facts(
        printable(name),
        int(history.steps[0]),
        int(history.steps[-1]),
        len(history.steps),
        float(history.time[0]),
        float(history.time[-1]),
        len(history.names),
        len(history.tensor_steps),
        float(np.median(finite)) if len(finite) else math.nan,
        float(finite.max()) if len(finite) else math.nan,
        int(((history.factor < 1) & ~history.skipped).sum()),
        int(history.skipped.sum()),
        int((history.nonfinite > 0).sum()),
        Buckets(history).size,
    )
