"""Run functions of a module in several processes at once, the ranks of a group."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

START = """
import faulthandler, importlib, os, sys
faulthandler.dump_traceback_later({seconds}, exit=True)
sys.path.insert(0, {folder!r})
for function in {functions!r}:
    getattr(importlib.import_module({module!r}), function)()
sys.stdout.flush()
os._exit(0)  # the threads of process groups do not always end well with the interpreter
"""


def run_ranks(module: str, functions: list[str], count: int, *, seconds: int = 200) -> list[str]:
    """What each prints; an error in one, or a hang, shows the output and stack of every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = START.format(
        seconds=seconds, folder=str(Path(__file__).parent), module=module, functions=functions
    )
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**common, "RANK": str(rank), "WORLD_SIZE": str(count)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        ended = [process.communicate(timeout=seconds + 30) for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    told = "\n".join(f"rank {rank}: {out}\n{err}" for rank, (out, err) in enumerate(ended))
    assert not any(codes), f"ended with {codes}\n{told}"
    return [out for out, _ in ended]
