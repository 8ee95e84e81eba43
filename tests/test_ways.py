"""The ways through the code, as decision 15 tells them, are those that the code has."""

import re

import pytest

from tools import ways


def test_the_record_is_not_stale() -> None:
    record = ways.RECORD.read_text()
    assert ways.with_ways(record) == record, "run python tools/ways.py --markdown"


def test_a_record_without_its_markers_is_refused() -> None:
    with pytest.raises(LookupError, match="markers"):
        ways.with_ways("# Four ways")


@pytest.mark.parametrize(
    "way", ["pipeline.work:carry_in", "pipeline.nowhere:carry_out", "pipeline.work:Work.x"]
)
def test_a_name_that_is_not_there_is_an_error(way: str) -> None:
    with pytest.raises(LookupError, match=re.escape("tools/ways.py names it")):
        ways.follow([way])


def test_a_function_counts_once_and_from_its_decorator_to_its_last_line() -> None:
    entry = "pipeline.engine.cluster:_signal_handlers_kept connect _signal_handlers_kept"
    kept, connect = ways.follow([entry])
    text = (ways.ROOT / kept.file).read_text().splitlines()
    start = text.index("@contextlib.contextmanager")
    body = text[start : start + kept.lines]
    assert body[1].startswith("def _signal_handlers_kept")
    assert body[-1].startswith("        ")
    assert text[start + kept.lines] == ""
    assert connect.name == "connect"
