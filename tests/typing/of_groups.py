"""What a `group` may be, and what limits, norms and callbacks of trainers look like."""

import numpy as np
import numpy.typing as npt
import torch
from mpi4py import MPI
from told import assert_type
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

import gradclip
from gradclip.torch import Clipper, attach, clip_grad_norm_, get_total_norm

a: npt.NDArray[np.float64] = np.array([3.0, 4.0])
assert_type(gradclip.global_norm([a], group=MPI.COMM_SELF), np.float32 | np.float64)
assert_type(gradclip.clip_by_global_norm_([a], 1.0, group=MPI.COMM_SELF), np.float32 | np.float64)


def of_workers(stage: torch.nn.Module, group: ProcessGroup | DeviceMesh) -> list[Tensor]:
    clipper = attach(torch.optim.SGD(stage.parameters()), 1.0, group=group)
    assert_type(clipper, Clipper)
    return [
        clip_grad_norm_(stage.parameters(), 1.0, group=group),
        get_total_norm(stage.parameters(), group=group),
        gradclip.global_norm([parameter.grad for parameter in stage.parameters()], group=group),
    ]
