"""Clipping on a GPU: bits first, then time, in one table. One call of a few minutes.

python bench/gpu.py [--json FILE]    with a GPU
python bench/gpu.py --compiled       without one: what the compiled kernels take for an element
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradclip
import gradclip.torch as gtorch
from gradclip import limits
from gradclip.cli._console import print_table
from gradclip.kernels.gpu.launch import OPTIONS

TURNS = 15


# ---- bits ----


Clip = Callable[[list[Tensor], Any], Tensor]


def check_bits(
    device: torch.device, lists: int = 200, here: Clip = gradclip.clip_by_global_norm_
) -> int:
    """Clip lists on the device and on the CPU; AssertionError where a bit differs."""
    generator = torch.Generator().manual_seed(0)
    for number in range(lists):
        leaves = random_list(generator, number)
        # A part of a tensor begins anywhere, not only at a multiple of 16 bytes.
        there = [torch.cat([leaf[:1], leaf]).to(device)[1:] for leaf in leaves]
        limit = 2.0 ** int(torch.randint(-40, 40, (), generator=generator))
        wanted = here(leaves, limit)
        norm = gradclip.clip_by_global_norm_(there, limit)
        assert same_bits(norm, wanted), f"list {number}: the norm"
        for leaf, other in zip(leaves, there, strict=True):
            assert same_bits(leaf, other), f"list {number}: an element of {leaf.dtype}"
    return lists


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]


def random_list(generator: torch.Generator, number: int) -> list[Tensor]:
    """Tensors of mixed dtypes: wide, subnormal, with NaN or inf, empty, of many tiles."""
    dtypes = DTYPES if number % 3 == 0 else DTYPES[:3]
    leaves = []
    for place in range(number % 5 + 1):
        size = [0, 1, 17, 4096, 12_289, 70_001][(number + place) % 6]
        spread = [0.0, 20.0, 240.0][number % 3]
        exponents = -spread * torch.rand(size, generator=generator, dtype=torch.float64)
        values = torch.randn(size, generator=generator, dtype=torch.float64) * exponents.exp2()
        leaves.append(values.to(dtypes[(number + place) % len(dtypes)]))
    if number % 20 == 19 and leaves[0].numel():
        leaves[0][0] = math.nan if number % 40 == 39 else math.inf
    return leaves


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Where neither is NaN."""
    a, b = one.cpu(), other.cpu()
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.contiguous().view(integers) == b.contiguous().view(integers)
    return a.dtype == b.dtype and bool((same | (a.isnan() & b.isnan())).all())


def check_limits(
    device: torch.device, steps: int = 60, here: Clip = gradclip.clip_by_global_norm_
) -> None:
    """Limits that learn on the device learn what they do on the CPU."""
    average = limits.Average(1.1, warmup=3)
    kinds = [limits.ZScore(warmup=3), limits.ZScore(warmup=3, log=True), average]
    for kind in (*kinds, limits.Percentile(60, 20), limits.PerTensor(average)):
        generator = torch.Generator().manual_seed(0)
        one, other = copy.deepcopy(kind), copy.deepcopy(kind)
        for step in range(steps):
            sizes = torch.randn(3, generator=generator).exp().tolist()
            leaves = [torch.randn(70_001, generator=generator) * size for size in sizes]
            gradclip.clip_by_global_norm_([leaf.to(device, copy=True) for leaf in leaves], one)
            here(leaves, other)
            ours, theirs = (
                torch.as_tensor(each.last_limit, dtype=torch.float64).cpu() for each in (one, other)
            )
            torch.testing.assert_close(
                ours, theirs, rtol=1e-12, atol=0, msg=f"{kind!r}, step {step}"
            )


def check_graph(device: torch.device) -> None:
    """A captured clip, replayed with other gradients, gives the norms of these."""
    leaf = torch.randn(10_000, device=device)
    gradclip.clip_by_global_norm_([leaf], 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = gradclip.clip_by_global_norm_([leaf], 1.0)
    for scale in (0.001, 3.0, 700.0):
        values = scale * torch.randn(10_000)
        leaf.copy_(values)
        graph.replay()
        wanted = gradclip.clip_by_global_norm_([values], 1.0)
        assert same_bits(norm, wanted), "the norm of a replay"
        assert same_bits(leaf, values), "the elements of a replay"


# ---- lists ----


def lists(free: int) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """What is clipped: name and gradients on the current device."""
    yield "1.5 G bfloat16", lambda: [noise((1_500_000_000,), torch.bfloat16)]
    layers = min(32, int(free / 6 / 2 / 202e6))
    shapes = [(32_000, 4096), *llama(layers), (4096,), (32_000, 4096)]
    yield f"7 B, {layers} layers, bfloat16", lambda: [noise(s, torch.bfloat16) for s in shapes]
    yield "GPT-2, float32", lambda: [noise(s, torch.float32) for s in gpt2()]
    yield "2000 x 4096", lambda: [noise((4096,), torch.float32) for _ in range(2000)]
    yield "10000 x 16", lambda: [noise((16,), torch.float32) for _ in range(10_000)]


def llama(layers: int) -> list[tuple[int, ...]]:
    """The shapes of so many layers of a model of 7 B parameters."""
    layer = [(4096, 4096)] * 4 + [(11_008, 4096)] * 2 + [(4096, 11_008), (4096,), (4096,)]
    return layer * layers


def gpt2() -> list[tuple[int, ...]]:
    """The 148 shapes of the small GPT-2."""
    layer = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,)]
    layer += [(768, 3072), (3072,), (3072, 768), (768,)]
    return [(50_257, 768), (1024, 768), *layer * 12, (768,), (768,)]


def noise(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


# ---- time ----


class Timed(NamedTuple):
    """Medians in seconds."""

    device: float
    host: float


def timed(calls: dict[str, Callable[[], Any]], turns: int = TURNS) -> dict[str, Timed]:
    """Each call in turn, so that what slows one down slows all."""
    found: dict[str, list[Timed]] = {name: [] for name in calls}
    for turn in range(turns + 3):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            start = time.perf_counter()
            call()
            host = time.perf_counter() - start
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:
                found[name].append(Timed(begin.elapsed_time(end) / 1000, host))
    return {
        name: Timed(*map(statistics.median, zip(*each, strict=True)))
        for name, each in found.items()
    }


def bandwidth() -> float:
    """Bytes per second, read and written, of a copy."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed({"": lambda: target.copy_(source)})[""].device


def launches(call: Callable[[], Any]) -> tuple[int, int]:
    """How many kernels and copies a call launches, and how often the host waits."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    launched = sum("LaunchKernel" in name or "MemcpyAsync" in name for name in names)
    waited = sum("Synchronize" in name for name in names)
    return launched, max(waited - 1, 0)  # the profiler itself waits once, at its end


def peak(call: Callable[[], Any]) -> int:
    """Bytes that a call takes beyond what there is."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def rows_of(name: str, grads: list[Tensor], speed: float) -> Iterator[dict[str, Any]]:
    """PyTorch's and our clip of a list, with nothing to clip and with something."""
    parameters = [torch.nn.Parameter(torch.empty(0, device="cuda")) for _ in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.data = grad  # shares it: no memory for weights that nobody reads
        parameter.grad = grad
    size = sum(grad.nbytes for grad in grads)
    norm = float(gtorch.get_total_norm(grads))
    shrinking = [norm]

    def limit(clips: bool) -> float:
        shrinking[0] *= 0.999
        return shrinking[0] if clips else 1e30

    for clips in (False, True):
        calls = {
            "torch": lambda clips=clips: torch.nn.utils.clip_grad_norm_(parameters, limit(clips)),
            "gradclip": lambda clips=clips: gtorch.clip_grad_norm_(parameters, limit(clips)),
        }
        if not clips:  # which learn that there is nothing to clip
            learning = limits.ZScore(), limits.PerTensor(limits.Average(1.05, limit=1e30))
            calls |= {
                f"gradclip, {type(each).__name__}": partial(
                    gtorch.clip_grad_norm_, parameters, each
                )
                for each in learning
            }
        times = timed(calls)
        for system, call in calls.items():
            launched, waited = launches(call)
            yield {
                "list": name,
                "clips": clips,
                "system": system,
                "device_us": times[system].device * 1e6,
                "of_N/BW": times[system].device / (size / speed),
                "host_us": times[system].host * 1e6,
                "launches": launched,
                "waits": waited,
                "peak_bytes": peak(call),
                "N_bytes": size,
            }


def steps(speed: float) -> Iterator[dict[str, Any]]:
    """A step of a fused AdamW, with and without `attach`: what it adds."""
    for scaled in (False, True):
        parameters = [torch.nn.Parameter(noise(shape, torch.float32)) for shape in gpt2()]
        others = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
        for parameter in (*parameters, *others):
            parameter.grad = torch.randn_like(parameter)
        optimizers = [torch.optim.AdamW(each, fused=True) for each in (parameters, others)]
        gtorch.attach(optimizers[1], 1e30)
        if scaled:
            for optimizer in optimizers:
                optimizer.grad_scale = torch.ones((), device="cuda")
                optimizer.found_inf = torch.zeros((), device="cuda")
        alone, attached = timed(
            {str(place): optimizer.step for place, optimizer in enumerate(optimizers)}
        ).values()
        size = sum(parameter.nbytes for parameter in parameters)
        yield {
            "list": "GPT-2, a fused AdamW step" + (", with a GradScaler" if scaled else ""),
            "alone_us": alone.device * 1e6,
            "attached_us": attached.device * 1e6,
            "added_of_N/BW": (attached.device - alone.device) / (size / speed),
        }


def measured() -> dict[str, Any]:
    """Everything, in the order of the table."""
    device = torch.device("cuda", torch.cuda.current_device())
    checked = check_bits(device)
    check_limits(device)
    check_graph(device)
    speed = bandwidth()
    rows = []
    free, _ = torch.cuda.mem_get_info()
    for name, make in lists(free):
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += list(rows_of(name, make(), speed))
        gc.collect()
        torch.cuda.empty_cache()
    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "gradclip": gradclip.__version__,
        "lists_of_equal_bits": checked,
        "bandwidth_GB/s": speed / 1e9,
        "rows": rows,
        "steps": list(steps(speed)),
    }


# ---- without a device ----


def compiled() -> list[dict[str, Any]]:
    """What the compiled kernels' loops over whole tiles take for an element."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    rows = []
    for capability in (80, 90):
        for name, constants, binary in binaries(GPUTarget("cuda", capability, 32)):
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(binary.asm["cubin"])
                file.flush()
                listed = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
                used = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
            registers, stack = map(int, re.findall(r"(?:REG|STACK):(\d+)", used)[:2])
            ptx = binary.asm["ptx"]
            # But for what the logarithm and the exponential look up by.
            ptx = re.sub(r"abs\.ftz\.f32|rcp\.approx\.ftz\.f64", "", ptx)
            assert ".ftz" not in ptx, "subnormal numbers are kept"
            assert not re.search(r"(div|sqrt)\.(approx|full)", ptx), "correctly rounded"
            every = {
                "kernel": name + (", wide" if constants.get("WIDE") else ""),
                "sm": capability,
                "registers": registers,
                "stack": stack,
                "shared_bytes": binary.metadata.shared,
            }
            rows += [every | loop for loop in loops(listed)]
    return rows


def binaries(target: Any) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """The kernels, compiled: name, constants, result."""
    import triton
    from triton.compiler import ASTSource

    from gradclip.kernels.gpu import each
    from gradclip.kernels.gpu import triton as cuda

    small = {"SMALL": cuda.SMALL}
    tiles = small | {"TILE": cuda.TILE}
    of_all = {"PROGRAMS": cuda.MOST_PROGRAMS, "WIDE": False}
    of_each = {"BLOCK": each.BLOCK, "WIDE": False}
    for kernel, constants in (
        (cuda.measure, tiles | of_all | {"KIND": 0}),
        (cuda.measure, tiles | of_all | {"WIDE": True, "KIND": 0}),
        (cuda.share, small),
        (cuda.rewrite, tiles),
        (cuda.measure, tiles | of_all | {"KIND": 2}),
        (each.measure_each, tiles | {"WIDE": False}),
        (each.decide_each, small | of_each | {"KIND": 3}),
        (each.decide_each, small | of_each | {"WIDE": True, "KIND": 4}),
        (each.tell_each, of_each),
        (each.rewrite_each, tiles),
    ):
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={name: "constexpr" if name in constants else "i64" for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
        yield kernel.fn.__name__, constants, triton.compile(source, target=target, options=OPTIONS)


def loops(listed: str) -> Iterator[dict[str, Any]]:
    """The loops that load 16 bytes at a time; kind of element, and instructions for each."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in listed.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.*?);", line):
            code.append(instruction[1].strip())
    for end, instruction in enumerate(code):
        target = re.match(r"BRA.*`\((\.L\w+)\)", instruction)
        if not target or labels.get(target[1], end) >= end:
            continue
        body = code[labels[target[1]] : end + 1]
        wide = [i for i in body if re.match(r"(LDG|LDS)\.\S*128", i)]
        if not wide or any("BRA" in each for each in body[:-1]):
            continue
        text = "\n".join(body)

        def count(pattern: str, text: str = text) -> int:
            return len(re.findall(rf"^(?:{pattern})", text, re.MULTILINE))

        size = 16 * len(wide)
        if count("DMUL") and not count("F2F"):
            elements, kind = size // 8, "float64"
        else:
            elements = count("FSEL") or count("DFMA")  # one each, to fill it or to add its square
            half = "float16" if re.search(r"HADD2|F2FP|F64\.F16", text) else "bfloat16"
            kind = "float32" if size == 4 * elements else half
        yield {
            "elements": kind,
            "instructions": round(len(body) / elements, 2),
            "in_float64": round(count("DADD|DMUL|DFMA") / elements, 2),
            "conversions": round(count("F2F") / elements, 2),
        }


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---- the table ----


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of the same columns."""
    cells = [
        [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        for row in rows
    ]
    print_table(title, list(rows[0]), cells, text=2)


def bars(rows: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the figures are held to."""
    ours = [row for row in rows if row["system"] == "gradclip"]
    found = []
    for row in ours:
        if row["N_bytes"] > 1 << 30:
            reading = row["device_us"] / row["of_N/BW"]
            bar = 3.3 * reading if row["clips"] else 1.1 * reading + 10
            found.append((row["list"], "clips" if row["clips"] else "keeps", row["device_us"], bar))
        if row["list"] == "10000 x 16":
            others = (each for each in rows if each["system"] == "torch")
            theirs = next(
                each
                for each in others
                if (each["list"], each["clips"]) == (row["list"], row["clips"])
            )
            found.append((row["list"], "host", row["host_us"], 0.1 * theirs["host_us"]))
        found.append((row["list"], "waits", float(row["waits"]), 0.0))
    found += [(step["list"], "adds, in N/BW", step["added_of_N/BW"], 1.1) for step in steps]
    return [
        {"list": name, "what": what, "measured": value, "bar": bar, "met": value <= bar}
        for name, what, value, bar in found
    ]


def main() -> None:
    """Measure, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--compiled", action="store_true", help="only look at compiled kernels")
    options = parser.parse_args()
    if options.compiled or not torch.cuda.is_available():
        if not options.compiled:
            print("There is no GPU here: nothing is timed. The compiled kernels:")
        result: Any = compiled()
        show("instructions per element, in loops over whole tiles", result)
    else:
        result = measured()
        print({key: value for key, value in result.items() if not isinstance(value, list)})
        show("clip_grad_norm_", result["rows"])
        show("what attach adds to a step", result["steps"])
        show("bars", bars(result["rows"], result["steps"]))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
