"""Which losses of a run are spikes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def spikes(
    losses: Sequence[float] | npt.NDArray[np.float64], window: int, deviations: float = 7.0
) -> npt.NDArray[np.bool_]:
    """If each loss is at least so many standard deviations away from those before it.

    ::

        |loss - mean| >= deviations * std    of the last `window` losses before it, or it is NaN

    The share of these, in percent, is the spike score of OLMo 2 (arXiv:2501.00656, section 3),
    with seven deviations and a window of 1,000; AdaGC (arXiv:2502.11034) reports spike scores, too.
    Short runs take a shorter window. The first ``window`` losses are none.

    >>> print(spikes([1.0, 1.2, 1.1, 3.0, 1.1], window=3))
    [False False False  True False]
    """
    series = np.asarray(losses, np.float64)
    found = np.zeros(len(series), bool)
    if len(series) > window:
        before = np.lib.stride_tricks.sliding_window_view(series[:-1], window)
        away = np.abs(series[window:] - before.mean(axis=1))
        # A NaN is not less than anything.
        found[window:] = ~(away < deviations * before.std(axis=1))
    return found
