"""What type checkers are told: of which framework a nest is, and so what its norm is.

A framework that is not installed is unknown to a checker, and what is unknown fits every argument.
So no overload takes a framework's class: arrays are told apart by something that those of one
framework alone have. Only results are of its classes, and nobody without it ever sees those.

What an overload says of a nest is true of arrays and tensors themselves. Of classes derived from
them that are no gradients, as ``torch.nn.Parameter``, ``tf.Variable`` and ``np.memmap`` are, what
comes back new is the plain tensor or array.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, ValuesView
from typing import Any, Never, Protocol, SupportsFloat, TypeVar, Union

import numpy as np

from gradclip.core.limits import Limit


class OfTorch(Protocol):
    """What tensors of PyTorch have."""

    def requires_grad_(self, mode: bool = True) -> Any:
        """PyTorch's own."""


class OfJax(Protocol):
    """What arrays of JAX have."""

    @property
    def addressable_shards(self) -> Any:
        """JAX's own."""


class OfTensorFlow(Protocol):
    """What tensors, variables and slices of TensorFlow have."""

    @property
    def graph(self) -> Any:
        """TensorFlow's own."""


OfNumPy = np.ndarray[Any, Any] | np.generic

Leaf = TypeVar("Leaf")
Nest = Union[Leaf, Sequence["Nest[Leaf] | None"], Mapping[Any, "Nest[Leaf] | None"]]  # noqa: UP007
Read = Union[Iterator[Nest[Leaf] | None], ValuesView[Nest[Leaf] | None]]  # noqa: UP007

# Of nothing, or of what a checker knows nothing about: it fits every overload, so it comes first.
UntoldNest = Sequence["Nest[Never] | None"] | Mapping[Any, "Nest[Never] | None"]

AnyNest = TypeVar("AnyNest")
Untold = TypeVar("Untold", bound=UntoldNest)
NumPyNest = TypeVar("NumPyNest", bound=Nest[OfNumPy])
TorchNest = TypeVar("TorchNest", bound=Nest[OfTorch])
JaxNest = TypeVar("JaxNest", bound=Nest[OfJax])
TensorFlowNest = TypeVar("TensorFlowNest", bound=Nest[OfTensorFlow])
TensorFlowLeaf = TypeVar("TensorFlowLeaf", bound=OfTensorFlow | None)

# To be measured, or clipped in place.
UntoldLeaves = UntoldNest | Read[Never]
NumPyLeaves = Nest[OfNumPy] | Read[OfNumPy]
TorchLeaves = Nest[OfTorch] | Read[OfTorch]
JaxLeaves = Nest[OfJax] | Read[OfJax]
TensorFlowLeaves = Nest[OfTensorFlow] | Read[OfTensorFlow]

NumPyNorm = np.float32 | np.float64
Scalar = SupportsFloat | OfTensorFlow  # to pyright TensorFlow's tensors are no such thing
ClipNorm = Scalar | Limit
