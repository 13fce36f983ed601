"""Which devices Triton compiles for, so that tensors are clipped there while the host goes on."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import warnings

import torch

from gradclip.core.versions import too_old
from gradclip.kernels.gpu.launch import TRITON


def has_triton(device: torch.device) -> bool:
    """If the kernels of `kernels.gpu` run on a device: NVIDIA's or AMD's, which are "cuda" too."""
    if device.type != "cuda":
        return False
    missing = _without_triton(device)
    if missing is not None:
        _warn_once(missing)
    return missing is None


@functools.cache
def _without_triton(device: torch.device) -> str | None:
    """Why Triton is not to be had for a device; None where it is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if "tensorflow" in sys.modules and "triton" not in sys.modules:
        # Each brings an LLVM, and loading the second one would abort the process.
        return "TensorFlow was imported before Triton, which no longer loads: import triton first"
    import triton

    old = too_old(TRITON, triton.__version__)
    if old is not None:
        return old
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler, by which it builds its launcher"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton compiles for NVIDIA's GPUs of compute capability 8.0 or newer"
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"{reason}. So PyTorch's own operations clip what is on the GPU: the same bits, slower, "
        "and the host waits for them",
        RuntimeWarning,
        stacklevel=2,
    )
