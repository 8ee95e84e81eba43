"""What `auto` chooses: the largest code that fits, with as little rescoring as the target allows."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_ray.errors import IndexBuildError
from bge_ray.index.choice import CODES, DEPTHS, FACTORS, Wish, choose
from bge_ray.index.factory import Metric, check_factory, index_bytes


def wish(n_rows: int, memory_gb: float, target: float = 0.95, k: int = 10) -> Wish:
    return Wish(n_rows, 768, int(memory_gb * 1e9), target, k)


@pytest.mark.parametrize(
    ("n_rows", "memory_gb", "factory", "rescores"),
    [
        (1, 1, "IDMap2,Flat", False),
        (100_000, 1, "IDMap2,Flat", False),
        (100_000, 0.2, "IDMap2,SQfp16", False),
        (1_000_000, 64, "IVF8192,SQ8", False),
        (10_000_000, 64, "IVF32768,SQ8", False),
        (1_000_000_000, 1000, "IVF262144,SQ8", False),
        (1_000_000_000, 500, "RR768,IVF262144,RaBitQ4", True),
        (1_000_000_000, 250, "RR768,IVF262144,RaBitQ2", True),
        (1_000_000_000, 120, "RR768,IVF262144,RaBitQ", True),
    ],
)
def test_auto(n_rows: int, memory_gb: float, factory: str, rescores: bool) -> None:
    choice = choose(wish(n_rows, memory_gb), None)
    assert (choice.factory, choice.rescore > 0) == (factory, rescores)
    assert choice.recall >= wish(n_rows, memory_gb).least_ceiling
    assert choice.rescore % 10 == 0
    assert len(choice.others) >= 3  # what it would cost instead
    assert f"{choice.bytes / 1e9:,.2f} GB" in str(choice)


def test_one_bit_without_rescoring_is_refused_and_so_is_what_does_not_fit() -> None:
    """Such an index misses its target with all lists probed: it would scan everything, for each query."""
    with pytest.raises(IndexBuildError, match=r"reaches index\.recall_target 0\.95 with 0 candidates"):
        choose(wish(1_000_000_000, 120), 0)
    with pytest.raises(IndexBuildError, match=r"fits into index\.memory_bytes 20,000,000,000"):
        choose(wish(1_000_000_000, 20), None)
    assert choose(wish(1_000_000_000, 120), 200).rescore == 200


@given(
    n_rows=st.integers(1, 10**11),
    dim=st.sampled_from([384, 768, 1024]),
    memory=st.integers(10**6, 10**13),
    target=st.floats(0.5, 1.0),
    k=st.integers(1, 1000),
)
@pytest.mark.slow
def test_auto_is_always_buildable_and_within_the_memory(
    n_rows: int, dim: int, memory: int, target: float, k: int
) -> None:
    asked = Wish(n_rows, dim, memory, target, k)
    try:
        choice = choose(asked, None)
    except IndexBuildError:
        smallest = check_factory(CODES[-1].factory(1, dim), dim, Metric.L2)
        assert index_bytes(smallest, n_rows) > 0.5 * memory
        return
    spec = check_factory(choice.factory, dim, Metric.L2)
    assert index_bytes(spec, n_rows) == choice.bytes <= memory
    assert choice.rescore == 0 or choice.rescore >= k
    if n_rows > 100_000:
        assert spec.nlist * 64 <= n_rows
    assert choose(dataclasses.replace(asked, memory_bytes=10 * memory), None).bytes >= choice.bytes


def test_the_table_is_whole_and_rescoring_more_never_recalls_less() -> None:
    for code in CODES:
        assert len(code.recall) == len(DEPTHS)
        for row in code.recall:
            assert len(row) == len(FACTORS)
            assert list(row) == sorted(row)
