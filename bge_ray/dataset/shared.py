"""Texts that several places have: which of them gives a text's outputs to the others, and how.

A place is a shard whose vectors are there, or a parcel whose texts are to be encoded; shards come first in
the count. A text is given by the lowest place that has it, to every parcel that has it: by a shard what it
holds, by a parcel what is encoded for it before all else. Nothing here is larger than the texts of one
bucket, which is a range of hashes, or the outputs of one place.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bge_ray.dataset.commit import VECTOR_FINGERPRINT_KEY
from bge_ray.dataset.reuse import TEXT_FACTS, HashArray, find_hashes, hash_array
from bge_ray.errors import StorageError
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.ids import IdArray
from bge_ray.records.schemas import TEXT_HASH_BYTES, embedding_schema
from bge_ray.storage.objects import Storage
from bge_ray.storage.sections import count_sections, pack_sections, read_sections

# Below the data set, while a run lasts: a folder for what is shared by the same places.
WORK = "work"
OWN_WORK = re.compile(r"[0-9a-f]{16}/(hashes|shared|given)/\d{8}")
# Sections of a file of entries, by the first bits of their hashes; buckets are made of whole ones.
HASH_SECTIONS = 1024
# Of a bucket, which a task sorts in memory; and of a section of outputs, which is read for one row of it.
BUCKET_BYTES, OUTPUT_BYTES = 16_000_000, 64_000
MOST_OUTPUT_SECTIONS = 1 << 16

# (n,) texts by their hashes, each with the number of a place.
ENTRY = np.dtype([("hash", f"S{TEXT_HASH_BYTES}"), ("place", "<i4")])
EntryArray: TypeAlias = npt.NDArray[Any]


def entries_of(hashes: HashArray, place: int) -> EntryArray:
    """Return the distinct texts of a place, ascending."""
    distinct = np.unique(hashes)
    entries = np.empty(len(distinct), ENTRY)
    entries["hash"], entries["place"] = distinct, place
    return entries


def pack_entries(parts: Sequence[EntryArray]) -> bytes:
    """Return the object with the entries of some places, in HASH_SECTIONS sections."""
    together = np.concatenate([np.empty(0, ENTRY), *parts])
    together = together[np.lexsort((together["place"], together["hash"]))]
    return pack_sections(_split(together, section_of(together["hash"], HASH_SECTIONS), HASH_SECTIONS))


def read_entries(storage: Storage, uri: str, sections: range) -> EntryArray:
    """Return the entries in some sections of such an object."""
    return np.frombuffer(b"".join(read_sections(storage, uri, sections)), ENTRY)


def buckets(n_entries: int) -> list[range]:
    """Return the sections of each bucket, so that a bucket of so many entries has about BUCKET_BYTES."""
    count = min(HASH_SECTIONS, max(1, -(-n_entries * ENTRY.itemsize // BUCKET_BYTES)))
    borders = [HASH_SECTIONS * number // count for number in range(count + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(borders)]


def section_of(hashes: HashArray, n_sections: int) -> IdArray:
    """Return which of so many equal ranges each hash is in; a power of two."""
    bits = n_sections.bit_length() - 1
    if not bits:
        return np.zeros(len(hashes), np.int64)
    first = np.frombuffer(np.ascontiguousarray(hashes).tobytes(), ">u8")[::2]
    return (first >> np.uint64(64 - bits)).astype(np.int64)


@dataclass(frozen=True)
class Sharing:
    """Who gives what to whom, of the texts of a bucket.

    ``gives`` are the texts that go to others, each with its giver, ordered by giver and hash. ``wants`` have
    a text for each parcel that it goes to, the giver itself among them, with that parcel as their place,
    ordered by it and hash; ``givers`` (len(wants),) are theirs.
    """

    gives: EntryArray
    wants: EntryArray
    givers: npt.NDArray[np.int32]

    def pack(self, n_places: int) -> bytes:
        """Return the object of the bucket: two sections a place, what it gives and what it wants."""
        wanted = self.wants.copy()
        wanted["place"] = self.givers
        gives = _split(self.gives, self.gives["place"], n_places)
        wants = _split(wanted, self.wants["place"], n_places)
        return pack_sections([part for both in zip(gives, wants, strict=True) for part in both])


def share(entries: EntryArray, n_shards: int) -> Sharing:
    """Find out who gives what to whom.

    Args:
        entries: all texts of a bucket, in any order, each once a place.
        n_shards: places below are shards, the others parcels.
    """
    entries = entries[np.lexsort((entries["place"], entries["hash"]))]
    hashes, places = entries["hash"], entries["place"]
    is_first = np.ones(len(entries), np.bool_)
    is_first[1:] = hashes[1:] != hashes[:-1]
    text = np.cumsum(is_first) - 1
    givers = places[is_first]
    is_parcel = places >= n_shards
    parcels = np.bincount(text[is_parcel], minlength=len(givers))
    shared = np.where(givers < n_shards, parcels > 0, parcels > 1)
    gives = entries[is_first][shared]
    wanted = is_parcel & shared[text]
    wants, their_givers = entries[wanted], givers[text[wanted]]
    order = np.argsort(wants["place"], kind="stable")
    return Sharing(gives[np.argsort(gives["place"], kind="stable")], wants[order], their_givers[order])


def read_gives(storage: Storage, uri: str, place: int) -> HashArray:
    """Return the hashes of the texts of a bucket that a place gives, ascending."""
    [content] = read_sections(storage, uri, [2 * place])
    return np.frombuffer(content, ENTRY)["hash"]


def read_wants(storage: Storage, uri: str, place: int) -> EntryArray:
    """Return the texts of a bucket that a parcel wants, each with the place that gives it, by hash."""
    [content] = read_sections(storage, uri, [2 * place + 1])
    return np.frombuffer(content, ENTRY)


def giving_places(sizes: npt.NDArray[np.int64]) -> IdArray:
    """Return the places that give something, by the sizes of the sections of a bucket."""
    return np.flatnonzero(sizes[::2])


def given_schema(spec: DatasetSpec) -> pa.Schema:
    """Return the columns of what is handed over: the hash of a text, its outputs, and TEXT_FACTS."""
    schema = embedding_schema(spec.model.outputs, pa.schema([]))
    names = ["text_hash", *(output.name for output in spec.model.outputs), *TEXT_FACTS]
    return pa.schema(
        [schema.field(name) for name in names],
        metadata={VECTOR_FINGERPRINT_KEY: spec.vector_fingerprint},
    )


def pack_given(table: pa.Table, spec: DatasetSpec) -> bytes:
    """Return the object with what a place gives.

    Args:
        table: n distinct texts, with the columns of `given_schema`.
        spec: of the data set.
    """
    schema = given_schema(spec)
    table = pa.table([table[name] for name in schema.names], schema=schema)
    hashes = hash_array(table["text_hash"])
    order = np.argsort(hashes, kind="stable")
    table = table.take(pa.array(order))
    n_sections = 1
    while n_sections < min(table.nbytes // OUTPUT_BYTES, len(table), MOST_OUTPUT_SECTIONS):
        n_sections *= 2
    borders = np.searchsorted(section_of(hashes[order], n_sections), np.arange(n_sections + 1))
    spans = zip(borders.tolist(), borders[1:].tolist(), strict=False)
    return pack_sections([_stream(table.slice(start, stop - start)) for start, stop in spans])


def take_given(storage: Storage, uri: str, spec: DatasetSpec, wanted: HashArray) -> tuple[IdArray, pa.Table]:
    """Read what a place gives of some texts.

    Memory: the sections that have one of them.

    Args:
        storage: where to read.
        uri: of the object of the place.
        spec: of the data set.
        wanted: (m,) distinct hashes.

    Returns:
        (k,) places in ``wanted`` of the texts that are there, ascending, and a table of k rows with the
        columns of `given_schema`, the hash apart.

    Raises:
        StorageError: the object is missing or damaged, or its vectors are those of another data set.
    """
    sections = section_of(wanted, count_sections(storage, uri))
    parts, hashes = [], []
    for content in read_sections(storage, uri, sections.tolist()):
        part = pa.ipc.open_stream(content).read_all()
        fingerprint = (part.schema.metadata or {}).get(VECTOR_FINGERPRINT_KEY, b"").decode()
        if fingerprint != spec.vector_fingerprint:
            raise StorageError(f"{uri}: holds vectors of another data set; remove it and run again")
        hashes.append(hash_array(part["text_hash"]))
        parts.append(part.drop_columns(["text_hash"]).replace_schema_metadata(None))
    if not parts:
        return np.empty(0, np.int64), pa.table({})
    found = find_hashes(np.concatenate(hashes), wanted)
    at = np.flatnonzero(found >= 0)
    return at, pa.concat_tables(parts).take(pa.array(found[at]))


def _split(entries: EntryArray, sections: npt.NDArray[np.integer], n_sections: int) -> list[bytes]:
    """Cut entries, ordered by the sections they belong to, into these."""
    borders = np.searchsorted(sections, np.arange(n_sections + 1)).tolist()
    return [entries[start:stop].tobytes() for start, stop in itertools.pairwise(borders)]


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data
