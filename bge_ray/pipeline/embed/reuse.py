"""Pieces whose vectors are there already: found in the reader, carried past the encoder, put in their place.

A piece takes its outputs from a shard of an earlier state, from an earlier piece of the same parcel with the
same text, or from what other shards and parcels gave (`sharing`); only the others are tokenised and encoded.
The outputs themselves travel, and not their places: what was read and proved once cannot be gone when it is
written.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bge_ray.dataset.reuse import (
    PARALLEL_SHARDS,
    HashArray,
    KnownTexts,
    find_hashes,
    read_hashes,
    take_known,
)
from bge_ray.dataset.shared import ENTRY, EntryArray, read_wants, take_given
from bge_ray.errors import StorageError
from bge_ray.pipeline.embed.sources import nearest
from bge_ray.pipeline.embed.tasks import EmbedJob, Shared, Source
from bge_ray.pipeline.engine.rows import spread
from bge_ray.records.arrays import whole
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.ids import IdArray, first_ids
from bge_ray.records.plan import Unit
from bge_ray.storage.objects import join

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=np.generic)

# Columns of a parcel; no column of a corpus that is kept has such a name.
LIKE, ORIGIN, KNOWN = "reuse:like", "reuse:origin", "reuse:known:"
# Where outputs that were not encoded came from.
ORIGINS = OBJECT, CORPUS, REPEATED = "object", "corpus", "repeated"


@dataclass(frozen=True)
class Reused:
    """Of m pieces, those that need no encoding.

    ``like`` (m,) says which piece has the outputs of each: itself, or the first with the same text.
    ``places`` (k,), ascending, are the pieces, each like itself, whose outputs the rows of ``known`` are.
    ``origin`` (m,) is one of ORIGINS, or null for what is encoded for this piece, now or before all else.
    """

    like: IdArray
    places: IdArray
    known: pa.Table
    origin: pa.Array

    @property
    def to_encode(self) -> IdArray:
        """Numbers of the pieces to be encoded, ascending."""
        return np.setdiff1d(np.flatnonzero(self.like == np.arange(len(self.like))), self.places)

    def settled(self, name: str, rows: IdArray, values: npt.NDArray[T]) -> npt.NDArray[T]:
        """Return a fact of all m texts: given for the ``rows`` that were tokenised, known for the others."""
        every = np.zeros(len(self.like), values.dtype)
        every[rows] = values
        if len(self.places):
            every[self.places] = self.known[name].to_numpy()
        return every[self.like]


class Earlier:
    """The texts of earlier shards, as the units of one task ask for them.

    Memory: the hashes of what the last unit asked for.
    """

    def __init__(self, job: EmbedJob) -> None:
        """Take where to read; nothing is read yet."""
        self._job = job
        self._hashes: dict[str, HashArray] = {}

    def near(self, units: Sequence[tuple[Unit, Sequence[Source]]]) -> KnownTexts:
        """Return the texts of the shards nearest to each of some units, among those that it has."""
        facts = {
            source.fact.path: source.fact
            for unit, sources in units
            for source in nearest(sources, unit.first_row, unit.n_rows)
        }
        missing = [fact for path, fact in facts.items() if path not in self._hashes]
        read = read_hashes(self._job.storage, self._job.root, missing)
        there = self._hashes | {fact.path: hashes for fact, hashes in zip(missing, read, strict=True)}
        self._hashes = {path: there[path] for path in facts}
        return KnownTexts.of(tuple(facts.values()), tuple(self._hashes.values()))


def find_reused(job: EmbedJob, hashes: HashArray, known: KnownTexts, place: int | None = None) -> Reused:
    """Find out which of m pieces, by the hashes of their texts, need no encoding.

    Args:
        job: of the run.
        hashes: (m,) of the pieces of a parcel.
        known: the texts of the shards near to it.
        place: of the parcel; None where parcels share nothing.
    """
    n = len(hashes)
    if job.reuse == "off":
        everything = np.arange(n, dtype=np.int64)
        return Reused(everything, everything[:0], pa.table({}), pa.nulls(n, pa.string()))
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    like = first[inverse].astype(np.int64)
    firsts = np.sort(first).astype(np.int64)
    at, outputs = take_known(job.storage, job.root, job.spec, known, hashes[firsts])
    places = firsts[at]
    origin = np.full(n, None, object)
    origin[like != np.arange(n)] = REPEATED
    origin[np.isin(like, places)] = OBJECT
    if job.shared is not None and place is not None:
        left = np.setdiff1d(firsts, places)
        at, more, givers = take_shared(job, job.shared, place, hashes[left])
        given = left[at]
        origin[np.isin(like, given[givers < job.shared.n_shards])] = CORPUS
        origin[given[(givers >= job.shared.n_shards) & (givers != place)]] = REPEATED
        some = [part for part in (outputs, more) if len(part)]
        outputs = pa.concat_tables(some) if some else outputs
        order = np.argsort(np.concatenate([places, given]), kind="stable")
        places, outputs = np.concatenate([places, given])[order], outputs.take(pa.array(order))
    return Reused(like, places, outputs, pa.array(origin, pa.string()))


def take_shared(
    job: EmbedJob, shared: Shared, place: int, wanted: HashArray
) -> tuple[IdArray, pa.Table, IdArray]:
    """Read what other places give of the texts of a parcel, and what was encoded for it beforehand.

    What cannot be read gives nothing, and is named: its texts are encoded anew.

    Args:
        job: of the run.
        shared: where it lies.
        place: of the parcel.
        wanted: (m,) distinct hashes.

    Returns:
        (k,) places in ``wanted``, ascending; a table of k rows with every output and TEXT_FACTS; and the (k,)
        places that gave them.
    """
    wants = np.concatenate([_wants(job, shared, bucket, place) for bucket in range(shared.n_buckets)])
    # Buckets are ranges of hashes, in order, and so are the texts of each.
    found = find_hashes(wants["hash"], wanted)
    giver = np.full(len(wanted), -1, np.int64)
    giver[found >= 0] = wants["place"][found[found >= 0]]

    def take(number: int) -> tuple[IdArray, pa.Table]:
        of_giver = np.flatnonzero(giver == number)
        uri = join(job.root, shared.given_path(number))
        try:
            at, table = take_given(job.storage, uri, job.spec, wanted[of_giver])
        except StorageError as error:
            logger.warning("no vector is taken from it, its texts are embedded anew: %s", error)
            return of_giver[:0], pa.table({})
        return of_giver[at], table

    with ThreadPoolExecutor(PARALLEL_SHARDS) as pool:
        parts = [part for part in pool.map(take, np.unique(giver[giver >= 0]).tolist()) if len(part[0])]
    at = np.concatenate([np.empty(0, np.int64), *(at for at, _ in parts)])
    order = np.argsort(at, kind="stable")
    table = pa.concat_tables([table for _, table in parts]) if parts else pa.table({})
    return at[order], table.take(pa.array(order)), giver[at[order]]


def _wants(job: EmbedJob, shared: Shared, bucket: int, place: int) -> EntryArray:
    try:
        return read_wants(job.storage, join(job.root, shared.shared_path(bucket)), place)
    except StorageError as error:
        logger.warning("no text is found by it, and those of others are embedded anew: %s", error)
        return np.empty(0, ENTRY)


def with_reused(table: pa.Table, at: IdArray, reused: Reused, spec: DatasetSpec) -> pa.Table:
    """Add to a table what its rows need no encoding for.

    Args:
        table: n rows.
        at: (m,) row of each piece.
        reused: of the m pieces.
        spec: of the data set.

    Returns:
        The table with LIKE (the row that has the outputs of a row), ORIGIN, and a column KNOWN + name for
        each output of the model; as it is if nothing is reused.
    """
    n = len(table)
    if reused.origin.null_count == len(reused.origin) and not len(reused.places):
        return table
    like = np.arange(n, dtype=np.int64)
    like[at] = at[reused.like]
    table = table.append_column(LIKE, pa.array(like)).append_column(ORIGIN, spread(reused.origin, at, n))
    for output in spec.model.outputs:
        if len(reused.places):
            values = whole(reused.known[output.name])
        else:
            values = pa.array([], output.type())
        table = table.append_column(KNOWN + output.name, spread(values, at[reused.places], n))
    return table


def settle_reused(table: pa.Table, spec: DatasetSpec) -> pa.Table:
    """Return an encoded table with every row's outputs in their columns, wherever they came from.

    A row like one that could not be done cannot be done, for the same reason.
    """
    if LIKE not in table.column_names:
        return table
    n = len(table)
    like = table[LIKE].to_numpy()
    for output in spec.model.outputs:
        encoded, known = whole(table[output.name]), whole(table[KNOWN + output.name])
        there = known.is_valid().to_numpy(zero_copy_only=False)
        rows = np.where(there, np.arange(n) + n, np.arange(n))[like]
        both = pa.concat_arrays([encoded, known])
        place = table.schema.get_field_index(output.name)
        table = table.set_column(place, output.name, both.take(pa.array(rows)))
    for name in ("reason", "detail"):
        mine = whole(table[name])
        # Reasons of its own, as of a passage that is rejected for another of its chunks, stay.
        rows = np.where(mine.is_null().to_numpy(zero_copy_only=False), like, np.arange(n))
        table = table.set_column(table.schema.get_field_index(name), name, mine.take(pa.array(rows)))
    return table


def count_reused(table: pa.Table, committed: Sequence[pa.ChunkedArray]) -> dict[str, int]:
    """Count what was not encoded of some shards.

    Args:
        table: what they were made of.
        committed: the vector ids of each shard.

    Returns:
        ``rows_reused``, corpus rows none of whose vectors was encoded for them; ``tokens_reused``; and
        ``vectors_`` + origin of each origin. Nothing where nothing was reused.
    """
    if ORIGIN not in table.column_names:
        return {}
    ids = pa.chunked_array([chunk for column in committed for chunk in column.chunks], pa.int64())
    ours = table.filter(np.isin(table["vector_id"].to_numpy(), ids.to_numpy()))
    origin = ours[ORIGIN]
    is_reused = origin.is_valid().to_numpy()
    rows, row_of = np.unique(first_ids(ours["vector_id"].to_numpy()), return_inverse=True)
    encoded = np.unique(row_of[~is_reused])
    counts = Counter(origin.drop_null().to_pylist())
    tokens = int(ours["n_tokens"].to_numpy()[is_reused].sum(dtype=np.int64))
    each = {f"vectors_{name}": count for name, count in sorted(counts.items())}
    return {"rows_reused": len(rows) - len(encoded), "tokens_reused": tokens, **each}
