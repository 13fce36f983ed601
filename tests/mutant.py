"""Run the checks of the suite on another build of the kernel, in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable

from builds import load_instead

SEEN = 3


def check_all() -> None:
    """What `test_bits` does on the kernel, with fewer lists."""
    import numpy as np

    import gradclip
    import test_bits
    import test_each
    from cases import DTYPES, Case, near_midpoints
    from compare import assert_norm, check
    from gradclip.kernels import cpu
    from machines import machine
    from oracle import norm

    for name in ("float16", "bfloat16", "float32", "float64", "mixed"):
        for case in test_bits.random_cases(name, 300):
            check(case)
    for name in ("float32", "float64"):
        for leaves in near_midpoints(np.random.default_rng(2), DTYPES[name], 20):
            assert_norm(gradclip.global_norm(leaves), norm(leaves)[1])
        test_bits.check_every_spread(name)
        with machine(cpu.kernel(), 2):
            check(*test_bits.long_case(name))
    for kernel in sys.modules["gradclip.kernels.cpu._cpu"].kernels():
        for name in ("float16", "bfloat16"):
            every = test_bits.cases.every_code(DTYPES[name])
            with machine(kernel, 1):
                check(Case([every], ["contiguous"], 0.75, use_norm=1.0))
    check(Case([np.float64([1e300, 1e-300])], ["contiguous"], 5e-324))
    test_bits.check_any_alignment()
    for kernel in sys.modules["gradclip.kernels.cpu._cpu"].kernels():
        with machine(kernel, 1):
            test_bits.check_every_length()
    test_bits.check_a_survey_of_what_is_not_finite()
    test_bits.check_the_bound(test_bits.many_leaves())
    test_each.check_some()
    test_each.test_one_listed_twice_counts_once_and_is_scaled_once()
    twice = np.float32([3, 4])
    assert gradclip.clip_by_global_norm_([twice, twice], 2.5) == 5
    assert twice.tolist() == [1.5, 2]


def check_what_xla_calls() -> None:
    import test_optax_examples

    test_optax_examples.check_all()


def main(library: str, check: Callable[[], None] = check_all) -> None:
    """Say what the kernel's own trial makes of it; exit with `SEEN` where a check fails."""
    kernel = load_instead(library)
    print("trial:", kernel.fault())
    kernel.fault = lambda: None  # or it would not be used
    from gradclip.kernels import cpu

    assert cpu._cpu is kernel
    try:
        check()
    except (AssertionError, FloatingPointError) as error:  # a norm that is wrong may be NaN
        print(error)
        sys.exit(SEEN)
