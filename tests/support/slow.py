"""Which cases of a test are left to `make test-slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Mark as slow all cases of a test but the quick ones, which stand for them in `make test`."""
    quick = list(quick)
    return [case if case in quick else slow(case) for case in cases]


def slow(case: Any) -> Any:
    """Mark one case; a tuple is its several arguments."""
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
