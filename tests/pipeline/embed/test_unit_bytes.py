"""A unit stays near batching.unit_bytes with all that its texts will come to."""

import dataclasses

import pytest

from bge_ray.formats.units import UnitCutter
from bge_ray.pipeline.embed.planning import settle_limits
from bge_ray.records.model import ModelSpec
from bge_ray.records.outputs import Output, row_bytes
from bge_ray.records.plan import UnitLimits
from bge_ray.settings.sections import BatchingSettings

DENSE = Output("embedding", "dense", 1024, "float16")
SPARSE = Output("sparse", "sparse", 250_002, "float16", "a")
COLBERT = Output("colbert", "multi", 1024, "float16", "b")
M3 = ModelSpec("m3", None, "w", "m3", (DENSE, SPARSE, COLBERT), "cls", 8192, True, "float16", "", "")
BATCHING = BatchingSettings(unit_rows=50_000)


def units(limits: UnitLimits, text_bytes: list[int]) -> list[list[int]]:
    """Return the texts of each unit, cut line by line."""
    cutter = UnitCutter(limits, sum(text_bytes))
    for size in text_bytes:
        cutter.add(0, 0, 1, size)
    [span] = cutter.as_stream(sum(text_bytes))
    left = iter(text_bytes)
    return [[next(left) for _ in range(n_rows)] for n_rows in span.unit_rows]


def expected(text_bytes: int) -> float:
    """Return what a text and its outputs take, at 4.5 bytes a token, as English has them."""
    return text_bytes + row_bytes(M3.outputs, min(8192, text_bytes / 4.5 + 2))


@pytest.mark.parametrize("text_bytes", [40, 450, 4_000, 30_000, 500_000])
def test_a_unit_of_every_length_stays_within_its_bytes(text_bytes: int) -> None:
    made = units(settle_limits(BATCHING, [], 1, M3), [text_bytes] * 6_000)
    sizes = [sum(expected(size) for size in unit) for unit in made]
    assert max(sizes) <= BATCHING.unit_bytes
    assert min(sizes[:-1]) > BATCHING.unit_bytes / 3, "cut smaller than needed"


def test_a_text_is_counted_as_far_as_the_model_reads_it() -> None:
    limits = settle_limits(BATCHING, [], 1, M3)
    longest = limits.bytes_of(1, 10_000_000) - 10_000_000
    assert longest == pytest.approx(row_bytes(M3.outputs, 8192))
    assert limits.bytes_of(3, 30_000_000) == 3 * limits.bytes_of(1, 10_000_000)
    short = settle_limits(BATCHING, [], 1, dataclasses.replace(M3, max_length=512))
    assert short.bytes_of(1, 10_000_000) - 10_000_000 == pytest.approx(row_bytes(M3.outputs, 512))


def test_dense_vectors_alone_are_cut_as_ever() -> None:
    limits = settle_limits(BATCHING, [], 1, dataclasses.replace(M3, outputs=(DENSE,)))
    assert limits.bytes_of(50, 1_000) == 1_000 + 50 * 2_048
    assert len(units(limits, [600] * 50_000)) == 2
    assert len(units(limits, [100] * 40_000)) == 1
