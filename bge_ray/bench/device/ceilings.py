"""What the device can do at best: the products of a layer, attention, copies, each as a median."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name the field uses

from bge_ray.bench.device.plan import Note, Plan, seconds_of
from bge_ray.bench.device.shapes import SPEED
from bge_ray.bench.machine import describe_machine

# Over so long short boosts of the clock do not count.
MATRIX_SECONDS = 2.0
SHORT_SECONDS = 0.15


def run(plan: Plan, note: Note) -> None:
    """Note the rates of this device; FLOP/s and bytes/s."""
    torch.backends.cuda.matmul.allow_tf32 = False
    note("machine", describe_machine() | _capability(plan))
    note("matrix", {dtype: square_rate(plan, dtype) for dtype in ("float16", "bfloat16", "float32")})
    note("products", _products(plan))
    note("attention", _attention(plan))
    note("copies", _copies(plan))
    if plan.on_gpu and torch.cuda.get_device_capability() >= (8, 9):
        note("float8", _float8(plan))


def _capability(plan: Plan) -> dict[str, object]:
    if not plan.on_gpu:
        return {"threads": torch.get_num_threads()}
    facts = torch.cuda.get_device_properties(0)
    return {
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "memory_bytes": facts.total_memory,
        "l2_bytes": facts.L2_cache_size,
        "multiprocessors": facts.multi_processor_count,
    }


def square_rate(plan: Plan, dtype: str) -> float:
    """Return the rate of large square products as a median, in FLOP/s: what shares are shares of."""
    size = 8192 if plan.on_gpu else 1024
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype), device=plan.device) for _ in range(2))
    taken = seconds_of(lambda: a @ b, plan.device, MATRIX_SECONDS if plan.on_gpu else SHORT_SECONDS)
    return 2 * size**3 / statistics.median(taken)


def _products(plan: Plan) -> list[dict[str, Any]]:
    """The products of a layer, each with its bias; FLOP/s."""
    found: list[dict[str, Any]] = []
    for name in ("small", "base", "large") if plan.on_gpu else ("base",):
        h, inner = SPEED[name].hidden_size, SPEED[name].intermediate_size
        for tokens in (8_192, 16_384, 32_768, 65_536) if plan.on_gpu else (512, 1_024):
            for what, columns, rows in (
                ("QKV", 3 * h, h),
                ("output", h, h),
                ("FFN 1", inner, h),
                ("FFN 2", h, inner),
            ):
                rate = _linear(plan, tokens, columns, rows, F.linear)
                found.append({"shape": name, "tokens": tokens, "product": what, "rate": rate})
            rate = _linear(plan, tokens, inner, h, lambda x, w, b: F.gelu(F.linear(x, w, b)))
            found.append({"shape": name, "tokens": tokens, "product": "FFN 1, then GELU", "rate": rate})
            rate = _linear(plan, tokens, inner, h, _with_gelu)
            found.append({"shape": name, "tokens": tokens, "product": "FFN 1 with GELU inside", "rate": rate})
    return found


def _with_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=True)  # type: ignore[no-any-return]


def _linear(plan: Plan, tokens: int, columns: int, rows: int, work: Callable[..., torch.Tensor]) -> float:
    make = {"dtype": getattr(torch, plan.half), "device": plan.device}
    x, weight, bias = (
        torch.randn(tokens, rows, **make),
        torch.randn(columns, rows, **make),
        torch.randn(columns, **make),
    )
    with torch.inference_mode():
        taken = seconds_of(lambda: work(x, weight, bias), plan.device, SHORT_SECONDS)
    return 2 * tokens * columns * rows / statistics.median(taken)


def _float8(plan: Plan) -> list[dict[str, Any]]:
    """Products in float8 beside those in half precision, alone and with the cast of what goes in; seconds."""
    compiled = torch.compile(_cast)
    found: list[dict[str, Any]] = []
    for name in ("base", "large"):
        h, inner = SPEED[name].hidden_size, SPEED[name].intermediate_size
        for what, columns, rows in (("QKV", 3 * h, h), ("FFN 1", inner, h), ("FFN 2", h, inner)):
            x, weight, bias = (
                torch.randn(size, dtype=torch.bfloat16, device=plan.device)
                for size in ((32_768, rows), (columns, rows), (columns,))
            )
            ready = (*_cast(x), *_cast(weight), bias)
            ways: dict[str, Callable[[], Any]] = {
                "bfloat16": partial(F.linear, x, weight, bias),
                "float8": partial(_scaled, *ready),
                "float8 with the cast": partial(_cast_and_scaled, compiled, x, *ready[2:]),
                "the cast": partial(compiled, x),
            }
            with torch.inference_mode():
                taken = {
                    way: statistics.median(seconds_of(work, plan.device, SHORT_SECONDS))
                    for way, work in ways.items()
                }
                exact = F.linear(x.float(), weight.float(), bias.float())
                error = float((_scaled(*ready).float() - exact).norm() / exact.norm())
            found.append({"shape": name, "product": what, "error": error, "seconds": taken})
    return found


def _cast(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (n, dim) in float8, each row in its own scale, and the scales, (n, 1)."""
    most = torch.finfo(torch.float8_e4m3fn).max
    scale = (states.abs().amax(1, keepdim=True).float() / most).clamp_min(1e-12)
    return (states / scale).to(torch.float8_e4m3fn), scale


def _scaled(
    states: torch.Tensor,
    by_row: torch.Tensor,
    weight: torch.Tensor,
    by_column: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    scales = {"scale_a": by_row, "scale_b": by_column.t(), "bias": bias}
    return torch._scaled_mm(states, weight.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def _cast_and_scaled(cast: Callable[..., Any], states: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    return _scaled(*cast(states), *rest)


def _attention(plan: Plan) -> list[dict[str, Any]]:
    """Attention of packed rows of equal length, 768 wide; FLOP/s and microseconds a thousand tokens."""
    from bge_ray.model.run.packed import attend

    found: list[dict[str, Any]] = []
    tokens = 32_768 if plan.on_gpu else 2_048
    for head_dim in (32, 64):
        for length in (85, 128, 512, 8_192) if plan.on_gpu else (85, 128, 512):
            rows = tokens // length
            shape = (rows * length, 768 // head_dim, head_dim)
            make = {"dtype": getattr(torch, plan.half), "device": plan.device}
            q, k, v = (torch.randn(*shape, **make) for _ in range(3))
            borders = torch.arange(rows + 1, dtype=torch.int32, device=plan.device) * length

            def work(
                q: torch.Tensor = q,
                k: torch.Tensor = k,
                v: torch.Tensor = v,
                borders: torch.Tensor = borders,
                rows: int = rows,
                length: int = length,
            ) -> torch.Tensor:
                return attend(
                    q, k, v, cu_seqlens=borders, runs=[(rows, length)], max_seqlen=length, scaling=None
                )

            with torch.inference_mode():
                second = statistics.median(seconds_of(work, plan.device, SHORT_SECONDS))
            flop = 4 * rows * length * length * 768
            found.append(
                {
                    "head_dim": head_dim,
                    "length": length,
                    "rate": flop / second,
                    "us_a_1000_tokens": second * 1e9 / (rows * length),
                }
            )
    return found


def _copies(plan: Plan) -> dict[str, float]:
    size = 1 << 30 if plan.on_gpu else 1 << 26
    here = torch.empty(size, dtype=torch.uint8, pin_memory=plan.on_gpu)
    there, other = (torch.empty(size, dtype=torch.uint8, device=plan.device) for _ in range(2))
    within = statistics.median(seconds_of(lambda: other.copy_(there), plan.device, SHORT_SECONDS))
    found = {"within the device, read and written": 2 * size / within}
    if plan.on_gpu:
        to = statistics.median(
            seconds_of(lambda: there.copy_(here, non_blocking=True), plan.device, SHORT_SECONDS)
        )
        back = statistics.median(
            seconds_of(lambda: here.copy_(there, non_blocking=True), plan.device, SHORT_SECONDS)
        )
        found |= {"to the device": size / to, "from the device": size / back}
    return found
