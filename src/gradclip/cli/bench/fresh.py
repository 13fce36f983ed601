"""Programs that measure what can be measured once in a process: each prints its figure."""

IMPORT = """
import numpy
from time import perf_counter
started = perf_counter()
import gradclip
print(1e3 * (perf_counter() - started))
"""
FIRST_CALL = """
import gradclip, numpy
from time import perf_counter
arrays = [numpy.ones(1000, numpy.float32)]
started = perf_counter()
gradclip.clip_by_global_norm_(arrays, 1.0)
print(1e3 * (perf_counter() - started))
"""


def memory(function: str, size: int, outputs: int) -> str:
    """Clip an array of ``size`` bytes; print the MB that it takes at the most, beyond outputs."""
    return f"""
import gradclip, numpy, re
def megabytes(key):
    with open("/proc/self/status") as status:
        return int(re.search(key + r":\\s+(\\d+)", status.read())[1]) * 1024 / 1e6
arrays = [numpy.ones({size} // 4, numpy.float32)]
before = megabytes("VmRSS")
result = gradclip.{function}(arrays, 1.0)
print(megabytes("VmHWM") - before - {outputs} / 1e6)
"""


def written(size: int, *, limit: float) -> str:
    """Clip an array of ``size`` bytes that is mapped copy-on-write; print the kB copied."""
    return f"""
import gradclip, numpy, re, tempfile
with tempfile.NamedTemporaryFile() as file:
    file.write(numpy.ones(1000, numpy.float32).tobytes())
    file.truncate({size})
    array = numpy.asarray(numpy.memmap(file.name, numpy.float32, "c"))
    gradclip.clip_by_global_norm_([array], {limit})
    with open("/proc/self/smaps") as maps:
        mine = [part for part in maps.read().split("VmFlags") if file.name in part]
    print(sum(int(re.search(r"Anonymous:\\s+(\\d+)", part)[1]) for part in mine))
"""
