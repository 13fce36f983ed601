"""Random shapes, strides and dtypes through a C kernel built elsewhere, held against NumPy's path.

Run by test_sanitize.py: ``python fuzz_kernel.py KERNEL.so ROUNDS SEED``.
"""

import os
import sys
import warnings

import ml_dtypes
import numpy as np

from builds import load_instead

DTYPES = [
    *map(np.dtype, ["f2", "f4", "f8", "c8", "c16", ">f2", ">f4", ">f8", ">c8", ">c16"]),
    *map(np.dtype, [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]),
]


def random_array(rng):
    """An array that owns exactly its memory, of any layout; often a view of one."""
    dtype = DTYPES[rng.integers(len(DTYPES))]
    ndim = int(rng.integers(0, 5))
    longest = 12 if ndim > 1 else 70_000 if rng.random() < 0.02 else 3000  # over one chunk
    shape = tuple(int(n) for n in rng.integers(0 if rng.random() < 0.1 else 1, longest, ndim))
    raw = bytearray(int(np.prod(shape)) * dtype.itemsize + 1)
    array = np.frombuffer(raw, dtype, int(np.prod(shape)), offset=int(rng.integers(2)))
    if dtype.itemsize == 1 or rng.random() < 0.3:
        array.view(np.uint8)[...] = rng.integers(0, 256, array.nbytes)  # NaN, Inf and all
    else:
        spread = 2.0 ** rng.integers(-rng.integers(1, 200), rng.integers(1, 100), array.shape)
        with np.errstate(all="ignore"):
            array[...] = (rng.standard_normal(array.shape) * spread).astype(dtype)
    array = array.reshape(shape)
    if ndim and rng.random() < 0.5:
        array = array.transpose(rng.permutation(ndim))
        steps = rng.choice([-2, -1, 1, 1, 2, 3], ndim)
        array = array[tuple(slice(None, None, int(step)) for step in steps)]
    return array


def outcome(gradclip, arrays, clip_norm):
    """Everything a user can see of one list, as bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        clipped, norm = gradclip.clip_by_global_norm(arrays, clip_norm, on_nonfinite="keep")
        given, _ = gradclip.clip_by_global_norm(arrays, 0.37, use_norm=1.0)
        twins = [array.copy(order="A") for array in arrays]
        gradclip.clip_by_global_norm_(twins, clip_norm, on_nonfinite="keep")
    return [_bytes(array) for array in [norm, *clipped, *given, *twins]]


def _bytes(array):
    """The array's bytes, every NaN made the same one."""
    array = np.asarray(array)
    parts = np.stack([array.real, array.imag]) if array.dtype.kind == "c" else np.array(array)
    with np.errstate(invalid="ignore"):
        parts[np.isnan(parts)] = 0
    return parts.tobytes()


def main(path, rounds, seed):
    kernel = load_instead(path)
    import gradclip
    from gradclip.kernels import cpu
    from gradclip.kernels.cpu import threads as team

    os.environ["GRADCLIP_NUM_THREADS"] = "2"
    team.BYTES_PER_THREAD = 1000
    rng = np.random.default_rng(int(seed))
    for _ in range(int(rounds)):
        arrays = [random_array(rng) for _ in range(rng.integers(0, 6))]
        clip_norm = float(2.0 ** rng.integers(-150, 60))
        results = []
        for name in ["numpy", *kernel.kernels()]:
            cpu._cpu = None if name == "numpy" else kernel
            if name != "numpy":
                kernel.choose_kernel(name)
            results.append(outcome(gradclip, arrays, clip_norm))
        assert all(result == results[0] for result in results), [a.dtype for a in arrays]
    print(rounds, "rounds agree")


if __name__ == "__main__":
    main(*sys.argv[1:])
