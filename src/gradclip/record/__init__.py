"""A record of a run: what was clipped in each step, in one file that survives the run.

`Record` writes it beside the training, `History` reads it, while the run goes on too.
"""

from gradclip.record.reading import History, TensorNorms
from gradclip.record.recording import Lent, Options, Record

__all__ = ["History", "Lent", "Options", "Record", "TensorNorms"]

History.__module__ = TensorNorms.__module__ = __name__
Record.__module__ = "gradclip"
