"""A nightly run encodes what is new, killed or not, and leaves what a clean run leaves."""

from pathlib import Path

import pytest

from tests.support.reuse_scale import LAST_BITS, measure


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_nightly_run_encodes_what_is_new_also_when_it_is_killed(tmp_path: Path) -> None:
    figures = measure(tmp_path / "work", 2_000, kills=5)
    print(figures)
    assert figures["share"] <= 0.025
    assert figures["rows reused"] > 0.97 * figures["rows to do"]
    assert figures["largest difference to a clean run"] < LAST_BITS
    assert figures["killed: largest difference to a clean run"] < LAST_BITS
    assert figures["killed: same manifest"], "on a CPU, byte for byte"
