"""Who gives which text to whom, against a plain loop over all texts; and what is handed over."""

from collections import defaultdict
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings

from bge_ray.dataset import shared
from bge_ray.dataset.reuse import hash_array, hash_column
from bge_ray.dataset.shared import (
    HASH_SECTIONS,
    buckets,
    entries_of,
    giving_places,
    pack_entries,
    pack_given,
    read_entries,
    read_gives,
    read_wants,
    section_of,
    share,
    take_given,
)
from bge_ray.errors import StorageError
from bge_ray.records.schemas import hash_texts
from bge_ray.storage.objects import Storage
from bge_ray.storage.sections import count_sections, section_sizes
from tests.support.records import make_spec

STORAGE = Storage(5)
SPEC = make_spec()
TEXTS = [f"text {n}" for n in range(40)]
HASHES = hash_array(hash_texts(TEXTS))


@pytest.mark.long
@given(
    st.lists(st.lists(st.integers(0, len(TEXTS) - 1), max_size=25), min_size=1, max_size=7),
    st.integers(0, 7),
    st.integers(1, 5),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_text_goes_from_the_lowest_place_that_has_it_to_every_parcel_that_has_it(
    tmp_path: Path, places: list[list[int]], n_shards: int, n_buckets: int
) -> None:
    has = defaultdict(set)
    for place, texts in enumerate(places):
        for text in texts:
            has[text].add(place)
    expected = set()
    for text, those in has.items():
        parcels = {place for place in those if place >= n_shards}
        if parcels and len(those) > 1:
            expected |= {(place, text, min(those)) for place in parcels}

    # By way of the files, two places in each, in buckets of any number.
    entries = [entries_of(HASHES[texts], place) for place, texts in enumerate(places)]
    files = []
    for first in range(0, len(places), 2):
        files.append(str(tmp_path / f"{first}"))
        STORAGE.write(files[-1], pack_entries(entries[first : first + 2]))
    borders = [HASH_SECTIONS * n // n_buckets for n in range(n_buckets + 1)]
    wants, gives = set(), set()
    text_of = {bytes(value): n for n, value in enumerate(HASHES)}
    for bucket in range(n_buckets):
        sections = range(borders[bucket], borders[bucket + 1])
        read = np.concatenate([read_entries(STORAGE, uri, sections) for uri in files])
        uri = str(tmp_path / "bucket")
        STORAGE.write(uri, share(read, n_shards).pack(len(places)))
        giving = giving_places(section_sizes(STORAGE, uri)).tolist()
        for place in range(len(places)):
            given = read_gives(STORAGE, uri, place)
            assert (np.sort(given) == given).all()
            assert bool(len(given)) == (place in giving)
            gives |= {(place, text_of[bytes(value)]) for value in given}
            wanted = read_wants(STORAGE, uri, place)
            wants |= {(place, text_of[bytes(w["hash"])], int(w["place"])) for w in wanted}
    assert wants == expected
    assert gives == {(giver, text) for _, text, giver in expected}


def test_buckets_have_every_section_once_and_grow_in_number_and_not_in_size() -> None:
    for n_entries in (0, 1, 10**6, 10**7, 10**9, 10**11):
        parts = buckets(n_entries)
        assert [section for part in parts for section in part] == list(range(HASH_SECTIONS))
    assert len(buckets(10**6)) == 2
    # Of a billion texts a task has 20 MB in hand.
    assert 10**9 / len(buckets(10**9)) * shared.ENTRY.itemsize < 25e6


def test_sections_are_ranges_of_hashes() -> None:
    hashes = np.sort(hash_array(hash_texts(f"{n}" for n in range(5_000))))
    for n_sections in (1, 2, 64, 1024):
        sections = section_of(hashes, n_sections)
        assert (np.diff(sections) >= 0).all(), "in the order of the hashes themselves"
        assert set(sections) == set(range(n_sections)) if n_sections < 1024 else sections.max() < 1024
    ends = np.asarray([b"\x00" * 16, b"\xff" * 16, b"\x7f" + b"\xff" * 15, b"\x80" + b"\x00" * 15], "S16")
    assert section_of(ends, 2).tolist() == [0, 1, 0, 1]
    # A hash may end with zeros, which numpy does not show.
    assert hash_array(hash_column(ends)).tobytes() == ends.tobytes()


def given_table(texts: list[str]) -> pa.Table:
    rng = np.random.default_rng(len(texts))
    flat = pa.array(rng.normal(size=8 * len(texts)).astype(np.float32))
    embedding = pa.FixedSizeListArray.from_arrays(flat, type=SPEC.model.outputs[0].type())
    lengths = pa.array(np.arange(len(texts), dtype=np.int32))
    columns = {"text_hash": hash_texts(texts), "n_tokens": lengths, "embedding": embedding}
    return pa.table({**columns, "truncated": pa.array(np.arange(len(texts)) % 3 == 0)})


def test_what_is_given_is_found_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "OUTPUT_BYTES", 500)
    texts = [f"given {n}" for n in range(300)]
    table, uri = given_table(texts), str(tmp_path / "given")
    STORAGE.write(uri, pack_given(table, SPEC))
    assert count_sections(STORAGE, uri) == 32
    asked = [*texts[250:], "nowhere", *texts[3:40], "not there either"]
    at, found = take_given(STORAGE, uri, SPEC, hash_array(hash_texts(asked)))
    assert [asked[place] for place in at] == [text for text in asked if text.startswith("given")]
    rows = dict(zip(texts, table.drop_columns(["text_hash"]).to_pylist(), strict=True))
    assert found.to_pylist() == [
        {name: rows[asked[place]][name] for name in found.schema.names} for place in at
    ]
    at, found = take_given(STORAGE, uri, SPEC, hash_array(hash_texts(["nowhere"])))
    assert (len(at), len(found)) == (0, 0)


def test_vectors_of_another_data_set_and_damaged_ones_are_not_taken(tmp_path: Path) -> None:
    texts = ["a", "b", "c"]
    uri, data = str(tmp_path / "given"), pack_given(given_table(texts), SPEC)
    STORAGE.write(uri, data)
    wanted = hash_array(hash_texts(texts))
    with pytest.raises(StorageError, match="given: holds vectors of another data set"):
        take_given(STORAGE, uri, make_spec(max_length=8), wanted)
    damaged = bytearray(data)
    damaged[-30] ^= 1
    STORAGE.write(uri, bytes(damaged))
    with pytest.raises(StorageError, match="given: is damaged"):
        take_given(STORAGE, uri, SPEC, wanted)
