"""What `gradclip.Record` and `gradclip.record` take and return."""

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from told import assert_type

import gradclip
from gradclip.record import History, Record, TensorNorms


def log(numbers: dict[str, float], step: int) -> None:
    print(step, numbers)


with tempfile.TemporaryDirectory() as folder:
    path = f"{folder}/run.db"
    with gradclip.Record(path, per_tensor_every=1, log=log) as record:
        assert_type(record, Record)
        assert_type(record.path, Path)
        record(0, 5.0, limit=1.0, factor=0.2)
        record(np.int64(1), np.float32(5), limit=np.array([1.0, 2.0]), skipped=True)
        record(2, gradclip.norms({"w": np.ones(2)}), limit=1)
        with pytest.raises(TypeError):
            record(3, "5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError):
            record(1.5, 5.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError):
            record(3, 5.0, 1.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with History.open(Path(path)) as history:
        assert_type(history, History)
        assert_type(history.steps, npt.NDArray[np.int64])
        assert_type(history.norm, npt.NDArray[np.float64])
        assert_type(history.skipped, npt.NDArray[np.bool_])
        assert_type(history.names, tuple[str, ...])
        assert_type(history.tensor_norms(), TensorNorms)
        assert_type(history.after(0), History)
        assert_type(history.begun_at(), int | None)
with pytest.raises(TypeError):
    gradclip.Record(path, 100)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
