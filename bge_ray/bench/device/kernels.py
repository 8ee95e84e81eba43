"""What a forward pass consists of: time by class of kernel, launches, and how busy the device is."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from bge_ray.bench.device.loop import lengths_of
from bge_ray.bench.device.plan import Note, Plan
from bge_ray.bench.device.shapes import KERNELS, SPEED, Variant, load_encoder, make_model, random_rows

# A class of work by what the names of its kernels hold; the first that fits.
CLASSES = {
    "attention": ("flash", "fmha", "attention"),
    "product with GELU": ("gelubias",),
    "product": ("gemm", "cutlass", "nvjet", "cublas", "addmm", "linear", "xmma", "aten::mm"),
    "GELU": ("gelu",),
    "normalise (and add)": ("layer_norm", "layernorm", "native_layer_norm", "triton_"),
    "copy": ("memcpy", "copy"),
    "fill": ("memset", "fill"),
    "add": ("add",),
    "look up": ("embedding", "gather", "index"),
}
BATCHES = 12


def run(plan: Plan, note: Note) -> None:
    """Note milliseconds a batch by class, launches a batch and the busy share, by shape and kernels."""
    found = []
    cases = [("base", "512", 32_768), ("base", "natural", 32_768), ("small", "natural", 65_536)]
    for shape, mix, budget in cases if plan.on_gpu else [("minilm", "natural", 1_024)]:
        folder = make_model(SPEED[shape], Path(plan.work) / f"speed-{shape}")
        for kernels in KERNELS:
            if plan.left < 0:
                continue
            found.append(_profile(plan, folder, (shape, mix, budget, kernels)))
            note("profiles", found)


def _profile(plan: Plan, folder: Path, case: tuple[str, str, int, str]) -> dict[str, Any]:
    shape, mix, budget, kernels = case
    model = load_encoder(folder, Variant(plan.half, kernels), plan.device, 512)
    tokens = random_rows(lengths_of(mix, budget * BATCHES), SPEED[shape].vocabulary)
    batches = model.cut(tokens, budget)[:BATCHES]
    model.warm_up(budget)
    model.run(tokens, batches, model.empty_result(len(tokens)))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if plan.on_gpu else [])]
    with profile(activities=activities) as profiler:
        result = model.empty_result(len(tokens))
        model.run(tokens, batches, result)
    by_class: dict[str, float] = defaultdict(float)
    by_name: dict[str, float] = defaultdict(float)
    spans = []
    for event in profiler.events():
        span = _device_span(event, plan)
        if span is None:
            continue
        spans.append(span)
        milliseconds = (span[1] - span[0]) / 1e3
        by_class[_class_of(event.name)] += milliseconds / len(batches)
        by_name[event.name] += milliseconds / len(batches)
    busy = _covered(spans)
    wall = max(end for _, end in spans) - min(start for start, _ in spans)
    slowest = sorted(by_name.items(), key=lambda entry: -entry[1])[:25]
    return {
        "shape": shape,
        "lengths": mix,
        "budget": budget,
        "kernels": kernels,
        "ms_by_class": dict(by_class),
        "ms_by_kernel": dict(slowest),
        "launches_a_batch": len(spans) / len(batches),
        "layers": SPEED[shape].num_hidden_layers,
        "busy": busy / wall,
    }


def _device_span(event: Any, plan: Plan) -> tuple[float, float] | None:
    """Return start and end of a kernel in microseconds, on a CPU of an operator that holds no other."""
    if plan.on_gpu:
        if event.device_type != DeviceType.CUDA:
            return None
    elif event.cpu_children or not event.name.startswith(("aten::", "mkldnn", "bge")):
        return None
    return event.time_range.start, event.time_range.end


def _class_of(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, marks in CLASSES.items() if any(m in lowered for m in marks)), "other")


def _covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
