"""What clipping takes of gradients that are spread over two processes, the ranks of a group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from importlib.util import find_spec
from time import perf_counter

from gradclip.cli.bench.contenders import Call

RANKS, ELEMENTS = 2, 1000
# So many seconds after the other rank has come to a standstill, one gives up.
PATIENCE = 60

Turn = dict[str, float]


def clips_of_dtensors(count: int) -> Iterator[Turn]:
    """Seconds of rank 0 in each system's clip_grad_norm_, on so many DTensors.

    Beside them are those of one all-reduce of the vector that gradclip sends, and what is allowed:
    1.2 times as many, 0.1 ms and 1 us a tensor.
    """
    if not find_spec("torch"):
        return
    with tempfile.TemporaryDirectory() as folder:
        ranks: list[subprocess.Popen[str]] = []
        try:
            for rank in range(RANKS):
                ranks.append(_started(rank, folder, count))
            assert ranks[0].stdout is not None
            yield from map(json.loads, ranks[0].stdout)
            raise ChildProcessError("a rank ended before its time")
        finally:
            for process in ranks:  # all, before one can miss another
                process.kill()
            for process in ranks:
                process.communicate()


def _started(rank: int, folder: str, count: int) -> subprocess.Popen[str]:
    code = f"from gradclip.cli.bench.ranks import run; run({rank}, {folder!r}, {count})"
    # One thread each, as torchrun has it: the ranks share the processors.
    threads = {"OMP_NUM_THREADS": "1", "GRADCLIP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads},
        process_group=0,  # Ctrl-C is for the one that ends them
    )


def run(rank: int, folder: str, count: int) -> None:
    """Be one of the ranks, until killed: rank 0 prints each turn as a line of JSON."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from gradclip.core.exact import total_of
    from gradclip.torch import clip_grad_norm_

    # The ranks meet in a file: there is no port that another could have taken.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/ranks",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=PATIENCE),
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(rank)
    drawn = [torch.randn(ELEMENTS // RANKS) for _ in range(count)]
    shards = [torch.empty_like(each) for each in drawn]
    parameters = []
    for shard in shards:
        gradient = DTensor.from_local(shard, mesh, [Shard(0)], run_check=False)
        parameters.append(torch.nn.Parameter(torch.empty_like(gradient)))
        parameters[-1].grad = gradient
    vector = torch.from_numpy(total_of())  # what gradclip sends, once in every clip
    systems: dict[str, Call] = {
        "gradclip": lambda: clip_grad_norm_(parameters, 1.0),
        "PyTorch": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0),
        "all-reduce": lambda: dist.all_reduce(vector),
    }
    while True:
        turn = {}
        for system, call in systems.items():
            torch._foreach_copy_(shards, drawn)
            dist.barrier()
            started = perf_counter()
            call()
            turn[system] = perf_counter() - started
        turn["allowed"] = 1.2 * turn["all-reduce"] + 1e-4 + 1e-6 * count
        if rank == 0:
            print(json.dumps(turn), flush=True)
