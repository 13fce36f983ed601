"""Time calls: the systems of a case in turns, none of which runs into the threads of another."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager

from gradclip.cli.bench.contenders import Call

# A call this short, in seconds, is repeated in a row.
BATCH = 0.01
# The helper threads of a system spin for some time before they sleep, at the cost of the next
# system: so wait, in pauses of so many seconds, until this process takes no processor time.
PAUSE, PAUSES = 0.02, 50


def timings(
    systems: Mapping[str, Call],
    repeats: int,
    others: AbstractContextManager[object] | None = None,
) -> dict[str, list[float]]:
    """The seconds that a call of each system takes, ``repeats`` times, in turns.

    ``others`` is what else runs then. How often a call is repeated in a row is found out before.
    """
    batches = {}
    for system, call in systems.items():
        call()  # may compile
        batches[system] = max(1, int(BATCH / seconds_of(call, 1)))
    seconds: dict[str, list[float]] = {system: [] for system in systems}
    gc.collect()
    gc.freeze()
    with others or contextlib.nullcontext():
        for repeat in range(repeats):
            start = repeat % len(systems)
            for system in [*systems][start:] + [*systems][:start]:
                gc.collect()
                _wait_until_idle()
                seconds[system].append(seconds_of(systems[system], batches[system]))
    gc.unfreeze()
    return seconds


def _wait_until_idle() -> None:
    for _ in range(PAUSES):
        before = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - before < PAUSE / 10:
            return


def seconds_of(call: Call, times: int) -> float:
    """What a call takes, of so many in a row."""
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times
