"""Put gradclip on a kernel and a number of threads, and take it off again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

from gradclip.kernels import cpu
from gradclip.kernels.cpu import threads as team

KERNELS = ["numpy", *(cpu._cpu.kernels() if cpu._cpu else ())]
THREADS = (1, 2)


@contextlib.contextmanager
def machine(kernel: str, threads: int = 1) -> Iterator[None]:
    """Run on a kernel of `KERNELS`; with two threads, however short the list is."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, GRADCLIP_NUM_THREADS=str(threads)))
        stack.enter_context(mock.patch.object(team, "BYTES_PER_THREAD", 1))
        if kernel == "numpy":
            stack.enter_context(mock.patch.object(cpu, "_cpu", None))
            stack.enter_context(mock.patch.object(cpu, "_warned", True))
        else:
            stack.callback(cpu._cpu.choose_kernel, cpu._cpu.kernel())
            cpu._cpu.choose_kernel(kernel)
        yield
