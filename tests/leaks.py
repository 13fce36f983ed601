"""What is left behind by many calls.

Run in a process of its own: a thread of whoever runs tests in parallel allocates in between.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import mmap
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np

import gradclip
from gradclip.kernels import cpu
from machines import machine


def one_round() -> int:
    """Calls of every kind; returns how many."""
    leaf = np.float32([3, 4])
    gradclip.clip_by_global_norm_([leaf], 2.5)
    gradclip.clip_by_global_norm({"a": leaf, "b": (np.float64([1]), None)}, 1.0)
    gradclip.clip_by_global_norm([np.array([3, 4], ml_dtypes.bfloat16)], math.inf)
    gradclip.global_norm([np.array([1], ml_dtypes.float8_e4m3fn)])
    gradclip.clip_by_global_norm([gradclip.IndexedSlices(leaf, np.array([1, 1]))], 1.0)
    gradclip.clip_by_global_norm_([leaf[::-1], leaf], 1e-3)
    gradclip.clip_by_global_norm_([np.float32([np.nan])], 1.0)
    for wrong in ([np.arange(2)], [leaf, 3], [np.broadcast_to(leaf, (2, 2))]):
        with contextlib.suppress(TypeError, ValueError):
            gradclip.clip_by_global_norm_(wrong, 1.0)
    return 10


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def check_many_calls(number_of_threads: int, calls: int) -> None:
    """Neither memory, nor blocks and references of Python's, grow with the calls."""

    def rounds(calls: int) -> None:
        while calls > 0:
            calls -= one_round()

    def in_use() -> tuple[int, int]:
        gc.collect()
        references = getattr(sys, "gettotalrefcount", int)()
        return sys.getallocatedblocks(), references

    with machine(cpu.kernel(), number_of_threads):
        rounds(5000)
        blocks, references = in_use()
        memory = [resident()]
        for _ in range(5):
            rounds(calls // 5)
            memory.append(resident())
        more_blocks, more_references = in_use()
        # Allocators take and keep up to 1 MB now and then; what leaks grows in every fifth.
        growth = [after - before for before, after in itertools.pairwise(memory)]
        assert min(growth) < 2 * calls // 5, growth
        # One block left by one of the ten kinds of call would be a tenth of the calls.
        assert more_blocks - blocks < calls // 20
        assert more_references - references < calls // 20


def check_what_python_counts() -> None:
    """Nothing is left that an allocator of Python's gave."""

    def grown_to(rounds: int) -> int:
        for _ in range(rounds):
            one_round()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        # Free lists and caches of names fill up first.
        before, after = grown_to(1500), grown_to(300)
    finally:
        tracemalloc.stop()
    assert after - before < 10 * 3000  # fewer bytes for each call than any object has
