"""Limits that set themselves: objects to give wherever a ``clip_norm`` or ``max_norm`` goes.

>>> import numpy as np, gradclip
>>> from gradclip import limits
>>> limit = limits.ZScore(warmup=3)  # once, before the loop
>>> for size in (3.0, 3.2, 2.8, 3.1, 50.0):
...     gradient = np.array([size])
...     norm = gradclip.clip_by_global_norm_([gradient], limit)
>>> print(gradient.round(2), round(limit.last_limit, 2))
[3.01] 3.01

==============  ==========================================================================
kind            clips
==============  ==========================================================================
`ZScore`        what stands out from a moving average by many deviations (ZClip)
`Percentile`    to a percentile of the norms so far (AutoClip), or a multiple of the median
`Average`       to a multiple of the moving average
`PerTensor`     each tensor by itself, by one of these (AdaGC)
==============  ==========================================================================

A limit keeps what it has learnt: ``state_dict`` saves it, ``load_state_dict`` goes on to the bit.
One object is for one list of gradients. A norm that is NaN, inf or 0 teaches nothing. In formulas n
is the norm before clipping, and m the smaller one of n and what the rule allows.
"""

from gradclip.core.limits import Average, Percentile, PerTensor, ZScore

for _kind in (Average, PerTensor, Percentile, ZScore):
    _kind.__module__ = __name__  # by which copies are pickled, wherever the code stands

__all__ = ["Average", "PerTensor", "Percentile", "ZScore"]
