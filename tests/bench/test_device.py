"""The script that tells everything about a device: its page, its clock, and that a CPU fills its tables."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from bge_ray.bench.device.kernels import _class_of, _covered
from bge_ray.bench.device.page import write_page
from bge_ray.bench.device.plan import Findings, run_within, seconds_of

LOOP_ROW = {
    "shape": "base",
    "lengths": "512",
    "budget": 32_768,
    "tokens_per_s": 2_387_132.0,
    "share": 0.61,
    "ms_a_batch": 13.5,
    "spread": 0.11,
    "peak_bytes": 900_000_000,
}
FOUND: dict[str, Any] = {
    "ended": {"ceilings": "done", "loop": "stopped after 120 s"},
    "ceilings": {
        "machine": {"gpu": "A card", "cores": 16},
        "matrix": {"float16": 6.78e14},
        "products": [{"shape": "base", "tokens": 8_192, "product": "QKV", "rate": 5.42e14}],
        "attention": [{"head_dim": 64, "length": 512, "rate": 2.4e14, "us_a_1000_tokens": 6.5}],
        "copies": {"within the device, read and written": 3e12},
    },
    "correctness": {
        "checks": {
            "head 64, cls": {"holds": True, "worst": 1e-6, "most": 1e-4},
            "a row that moves": {"holds": False, "worst": 0.5, "most": 4e-3},
            "one that broke": {"holds": False, "error": "RuntimeError('x')"},
        },
        "failed": ["a row that moves", "one that broke"],
    },
    "loop": {
        "matrix": 6.86e14,
        "rows": [LOOP_ROW | {"kernels": kernels} for kernels in ("plain", "fused")],
        "left_out": ["m3"],
    },
    "kernels": {
        "profiles": [
            {
                "shape": "base",
                "lengths": "512",
                "kernels": "fused",
                "ms_by_class": {"product": 8.2, "attention": 2.6},
                "launches_a_batch": 165,
                "layers": 12,
                "busy": 0.8,
            }
        ]
    },
    "job": {
        "loop": {"tokens_per_s": 2_000_000.0},
        "runs": {
            "defaults": {
                "steady_tokens_per_s": 1_500_000.0,
                "utilisation": 0.7,
                "waiting": 0.3,
                "wall_s": 84.0,
                "startup_s": 53.0,
            },
            "two encoders on the GPU": {"left_out": "no time was left"},
        },
    },
    "peers": {"ways": {"defaults (batches of 32)": {"tokens_per_s": 400_000.0}}},
    "nearest": {"find_nearest": {"rows": 1000, "sure": 0.9993}},
}


def test_the_page_tells_what_was_found_and_what_failed(tmp_path: Path) -> None:
    write_page(FOUND, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| base | 512 | 32,768 | fused | 2,387,132 | 61.0% | 13.50 | 11% | 0.9 |" in text
    assert "| a row that moves | DOES NOT HOLD | 0.5 | 0.004 |" in text
    assert "| one that broke | BROKE DOWN | RuntimeError('x') |  |" in text
    assert "| defaults | 1,500,000 | 0.75 | 70.0% | 30.0% | 84 s, 53 s of it start-up |" in text
    assert "| defaults (batches of 32) | 400,000 | 5.00 |" in text
    assert "Left out for want of time: m3." in text
    html = (tmp_path / "report.html").read_text()
    assert "2 checks do not hold" in html.lower()
    assert html.count("<svg") == 2


def test_a_page_of_nothing_says_so(tmp_path: Path) -> None:
    write_page({"ended": {"loop": "failed with 1: no torch"}}, tmp_path)
    assert "failed with 1: no torch" in (tmp_path / "report.md").read_text()
    assert "nothing was compared" in (tmp_path / "report.html").read_text().lower()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_hsh_192x192_64x4_2x1_v_bz_coopB_gelubias_TNN", "product with GELU"),
        ("nvjet_sm90_hsh_128x256_64x4_2x1_v_bz_coopA_bias_TNN", "product"),
        ("void pytorch_flash::flash_fwd_kernel<cutlass::half_t>", "attention"),
        ("triton_per_fused_add_native_layer_norm_0", "normalise (and add)"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl>", "GELU"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::Half>>", "add"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("Memset (Device)", "fill"),
        ("something new", "other"),
    ],
)
def test_kernels_have_their_class(name: str, kind: str) -> None:
    assert _class_of(name) == kind


def test_busy_time_counts_what_overlaps_once() -> None:
    assert _covered([(0, 2), (1, 3), (5, 6), (5.5, 5.8)]) == pytest.approx(4)
    assert _covered([]) == 0


def test_a_phase_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import subprocess as s, time; print(s.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    log = tmp_path / "log"
    assert run_within([sys.executable, "-c", child], log, 3.0) is None
    pid = int(log.read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run_within([sys.executable, "-c", "raise SystemExit(3)"], log, 30.0) == 3


def test_findings_are_whole_at_any_moment(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "loop.json")
    findings.note("rate", 1.0)
    findings.note("rows", [1])
    found = json.loads((tmp_path / "loop.json").read_text())
    assert (found["rate"], found["rows"]) == (1.0, [1])
    assert list(tmp_path.iterdir()) == [tmp_path / "loop.json"]


def test_what_is_timed_is_timed_three_times_and_a_first_time_that_does_not_count() -> None:
    calls: list[float] = []
    taken = seconds_of(lambda: calls.append(time.sleep(0.01)), "cpu", 0.0)  # type: ignore[func-returns-value]
    assert len(taken) == 3
    assert len(calls) == 4
    assert min(taken) >= 0.01


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cpu_fills_the_same_tables(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bge_ray.bench.device", "--out", str(tmp_path), "--device", "cpu"]
    words = ["--phases", "ceilings,correctness,kernels,nearest", "--minutes", "10"]
    subprocess.run([*command, *words], check=True, timeout=800)
    found = json.loads((tmp_path / "device.json").read_text())
    assert set(found["ended"].values()) == {"done"}
    assert found["correctness"]["failed"] == []
    assert {p["kernels"] for p in found["kernels"]["profiles"]} == {"plain", "fused"}
    assert found["nearest"]["find_nearest"]["disagree_where_sure"] == 0
