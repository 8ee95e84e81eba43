"""Sections of an object are read back one by one, in few requests, and a flipped bit is noticed."""

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from bge_ray.errors import StorageError
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.sections import (
    GAP_BYTES,
    HEADER_BYTES,
    count_sections,
    pack_sections,
    read_sections,
    section_sizes,
)
from tests.storage.doubles import Hooked

STORAGE = Storage(5)


@given(st.lists(st.binary(max_size=40), max_size=9), st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sections_are_read_back(tmp_path: Path, contents: list[bytes], data: st.DataObject) -> None:
    uri = str(tmp_path / "sections")
    STORAGE.write(uri, pack_sections(contents))
    assert count_sections(STORAGE, uri) == len(contents)
    assert section_sizes(STORAGE, uri).tolist() == [len(content) for content in contents]
    numbers = data.draw(st.lists(st.sampled_from(range(len(contents))))) if contents else []
    assert read_sections(STORAGE, uri, numbers) == [contents[n] for n in sorted(set(numbers))]


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    contents = [b"one", b"", b"three and some more"]
    uri, whole = str(tmp_path / "sections"), pack_sections(contents)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        STORAGE.write(uri, bytes(damaged))
        with pytest.raises(StorageError, match="sections: is damaged"):
            if count_sections(STORAGE, uri) != len(contents):
                raise StorageError(f"{uri}: is damaged: another number of sections")
            read_sections(STORAGE, uri, range(len(contents)))
    for length in (0, HEADER_BYTES, len(whole) - 1):
        STORAGE.write(uri, whole[:length])
        with pytest.raises(StorageError, match="sections: is damaged"):
            read_sections(STORAGE, uri, range(len(contents)))
    with pytest.raises(StorageError, match="no such object"):
        count_sections(STORAGE, str(tmp_path / "none"))


def test_neighbours_share_a_request_and_what_is_far_apart_does_not(root: str) -> None:
    uri = join(root, "sections")
    contents = [bytes([n]) * 100 for n in range(20)]
    contents[10] = b"x" * (GAP_BYTES + 1)
    Storage(20).write(uri, pack_sections(contents))
    storage = Hooked(20)
    assert read_sections(storage, uri, [2, 9, 11, 12]) == [contents[n] for n in (2, 9, 11, 12)]
    assert len(storage.counted) == 1 + 2, "the borders, and two runs"
