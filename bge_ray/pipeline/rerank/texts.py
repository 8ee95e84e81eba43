"""Texts of candidates: a join of passage ids with a corpus that no process holds.

Two passes: over the id columns of the embedding shards, to learn where a bare passage id lies; then over
those spans of the corpus (or those shards, where the text columns were kept) that hold a candidate. Both are
read once a run, by those who hold them; what comes back is as large as the candidates of one group.
"""

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bge_ray.dataset.folder import Dataset
from bge_ray.errors import SettingsError
from bge_ray.formats.candidates import NO_SPAN, ChunkSpan
from bge_ray.pipeline.runs.holders import SpanTexts, StoredRows
from bge_ray.pipeline.runs.passages import TEXT_SCHEMA, kept_texts, spans_of, text_columns
from bge_ray.pipeline.runs.source import Source
from bge_ray.records.arrays import whole
from bge_ray.records.chunking import Chunking
from bge_ray.records.columns import Columns
from bge_ray.records.ids import MAX_CHUNKS_PER_ROW, IdArray, first_ids
from bge_ray.records.plan import CorpusObject
from bge_ray.records.schemas import SPAN_COLUMNS, hash_texts
from bge_ray.settings.sections import Settings
from bge_ray.storage.objects import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """The text of a passage, or of the chunk of it at ``span``, or what keeps it from being read.

    ``body_start`` is the character at which the text of the corpus begins, behind the title; below 0 where
    white space before it was dropped.
    """

    passage_id: str | None
    text: str | None
    fault: str = ""
    body_start: int = 0
    span: ChunkSpan = NO_SPAN


@dataclass(frozen=True)
class TextSource:
    """Where the texts of a data set are: in the corpus objects, or (``kept``) in its own shards.

    ``stored`` tells what the data set holds of its rows. ``moved`` objects lie elsewhere than when they were
    embedded, so that only their texts prove what they are. Of a passage that was cut as ``chunking`` says, a
    chunk is read, or (``whole``) all of it.
    """

    stored: StoredRows
    columns: Columns
    objects: tuple[CorpusObject, ...]
    kept: bool
    moved: bool
    instruction: str
    chunking: Chunking | None
    whole: bool

    def places_of(self, passage_ids: Sequence[str]) -> dict[str, int]:
        """Return the vector ids of those passage ids that are there; the lowest of one embedded twice."""
        wanted = pa.array(passage_ids, pa.string())
        places = self._places(wanted, "passage_id")
        return {passage_ids[position]: vector_id for position, vector_id in places.items()}

    def places_of_texts(self, texts: Sequence[str]) -> dict[str, int]:
        """Return the vector ids of those texts that were embedded; the lowest of one embedded twice."""
        distinct = list(dict.fromkeys(texts))
        places = self._places(hash_texts(f"{self.instruction}{text}" for text in distinct), "text_hash")
        return {distinct[position]: vector_id for position, vector_id in places.items()}

    def _places(self, wanted: pa.Array, column: str) -> dict[int, int]:
        """Return the lowest vector id by the position of what is there of (n,) distinct values."""
        positions, ids = self.stored.find(wanted, column)
        found: dict[int, int] = {}
        for position, vector_id in zip(positions.tolist(), ids.tolist(), strict=True):
            found[position] = min(vector_id, found.get(position, vector_id))
        return found

    def texts_of(self, ids: IdArray, *, whole: bool = False) -> dict[int, Text]:
        """Return what is known of the (n,) ascending ids, without those that are nowhere.

        Args:
            ids: of rows, or of chunks.
            whole: read all of each passage, whatever was asked for: the chunk is not known.
        """
        if self.chunking is None:
            found = self._passages(ids)
            return self._verified(found) if self.moved else found
        passages = self._passages(np.unique(first_ids(ids)))
        chunks = self._chunks(ids, passages, self.chunking)
        if self.moved:
            chunks = self._verified(chunks)
        if not (whole or self.whole):
            return chunks
        rows = dict(zip(ids.tolist(), first_ids(ids).tolist(), strict=True))
        return {
            i: chunk if chunk.text is None else replace(passages[rows[i]], span=chunk.span)
            for i, chunk in chunks.items()
        }

    def _chunks(self, ids: IdArray, passages: dict[int, Text], chunking: Chunking) -> dict[int, Text]:
        """Return the chunks of some ids, cut out of their passages as they were embedded."""
        spans = self.stored.places(ids, SPAN_COLUMNS)
        found = {}
        for row, place in zip(
            first_ids(spans["vector_id"].to_numpy()).tolist(), spans.to_pylist(), strict=True
        ):
            text = passages.get(row)
            if text is not None and text.text is not None:
                body = text.text[text.body_start + place["start"] : text.body_start + place["end"]]
                titled = chunking.titles == "every" or place["chunk_no"] == 0
                title = text.text[: max(0, text.body_start - 1)] if titled else ""
                text = replace(text, text=f"{title} {body}".strip())
            if text is not None:
                number, start, end = (place[name] for name in SPAN_COLUMNS)
                found[place["vector_id"]] = replace(text, span=(number, start, end))
        return found

    def _passages(self, ids: IdArray) -> dict[int, Text]:
        """Return what is known of the (n,) ascending ids of rows, without those that are nowhere."""
        found: dict[int, Text] = {}
        if self.kept:
            table = self.stored.places(ids, ["passage_id", *text_columns(self.columns)])
            tables = [SpanTexts(kept_texts(table, self.columns))]
        else:
            tables = self.stored.texts(list(spans_of(self.objects, ids)), self.columns)
        for some in tables:
            found |= {vector_id: Text(None, None, some.fault) for vector_id in some.unreadable.tolist()}
            rows = zip(*(some.table[name].to_pylist() for name in TEXT_SCHEMA.names), strict=True)
            found |= {
                vector_id: Text(passage_id, text, body_start=start)
                for vector_id, passage_id, text, start in rows
            }
        return found

    def _verified(self, found: dict[int, Text]) -> dict[int, Text]:
        """Return texts of a moved corpus, those that are not what was embedded without their text."""
        ids = _ascending(vector_id for vector_id, text in found.items() if text.text is not None)
        stored = self.stored.places(ids, ["text_hash"])
        there = stored["vector_id"].to_pylist()
        hashes = hash_texts(f"{self.instruction}{found[vector_id].text}" for vector_id in there)
        same = pc.equal(whole(stored["text_hash"]).cast(hashes.type), hashes).to_pylist() if there else []
        for vector_id, unchanged in zip(there, same, strict=True):
            if not unchanged:
                fault = "the text at its place in corpus.uri is not the one that was embedded"
                found[vector_id] = Text(None, None, fault)
        return found


def takes_kept(settings: Settings, source: Source) -> bool:
    """Tell whether the texts of a data set come from its own shards; reads nothing.

    Raises:
        SettingsError: rerank.texts asks for columns that were not kept.
    """
    columns, asked = source.spec.columns, settings.rerank.texts
    kept = has_kept_texts(columns)
    if asked == "kept" and not kept:
        needed = text_columns(columns)
        raise SettingsError(
            f"rerank.texts kept: the data set keeps the columns {sorted(columns.kept)}, the texts are made "
            f"of {needed}; embed with corpus.keep_columns, or set rerank.texts to corpus"
        )
    return kept and asked != "corpus"


def open_texts(settings: Settings, source: Source, stored: StoredRows) -> TextSource:
    """Return where the texts of a data set come from, whose rows are ``stored``.

    Objects are where they were planned, or below corpus.uri if they were moved there.

    Raises:
        SettingsError: see `takes_kept`; or corpus.uri has no object.
    """
    use_kept = takes_kept(settings, source)
    _, plan = Dataset(source.storage, source.root).latest_plan()
    objects = () if use_kept or plan is None else plan.objects
    there = _find_moved(source.storage, objects, settings.corpus.uri) if objects else None
    return TextSource(
        stored=stored,
        columns=source.spec.columns,
        objects=there or objects,
        kept=use_kept,
        moved=there is not None,
        instruction=source.spec.model.passage_instruction,
        chunking=source.spec.chunking,
        whole=settings.rerank.reads == "passage",
    )


def _find_moved(
    storage: Storage, objects: Sequence[CorpusObject], corpus: str | None
) -> tuple[CorpusObject, ...] | None:
    """Return the objects where corpus.uri has them now; None where that is where they were, or not set."""
    listed = {info.uri: info for info in storage.list_files(corpus)} if corpus is not None else {}
    uris = [planned.uri for planned in objects]
    if corpus is None or not listed.keys().isdisjoint(uris):
        return None
    # What the paths of all have in common, and each below it; so it is for what was listed.
    before, after = _common_folder(uris), _common_folder(list(listed))
    moved = []
    for planned in objects:
        info = listed.get(after + planned.uri.removeprefix(before))
        if info is not None and info.size == planned.size:
            moved.append(replace(planned, uri=info.uri, etag=info.etag))
    if not moved:
        raise SettingsError(
            f"corpus.uri {corpus}: has none of the {len(objects):,} objects that were embedded from "
            f"{before}, as their paths and sizes tell; name the folder that they were moved "
            "to, or leave corpus.uri out"
        )
    logger.info("texts are read from %s, where %s of %s objects are", corpus, len(moved), len(objects))
    return tuple(moved)


def _common_folder(uris: Sequence[str]) -> str:
    """Return the longest folder, with its slash, that all lie in."""
    first, last = (uri.split("/")[:-1] for uri in (min(uris, default=""), max(uris, default="")))
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(f"{name}/" for name, _ in shared)


def has_kept_texts(columns: Columns) -> bool:
    """Tell whether the embedding shards hold what a passage text is made of."""
    return columns.text in columns.kept and (columns.title is None or columns.title in columns.kept)


def add_texts(table: pa.Table, source: TextSource, depth: int) -> pa.Table:
    """Fill in the texts of candidates that have none, and name those whose text is nowhere.

    A candidate's vector id says which of several passages of one id it is. Where the data set has another
    passage at that place by now, or none, and where there is no vector id, the passage id is looked up.
    Of passages in chunks, the span says which chunk it is; where it says none, or one that the data set has
    not there, all of the passage is read, and its span is null.

    Args:
        table: rows of CANDIDATE_SCHEMA, and of SPAN_SCHEMA over chunks, the best first within each row_no or
            query.
        source: of the data set that they come from.
        depth: candidates of each query that need a text.

    Raises:
        StorageError: a part of the corpus cannot be fetched.
    """
    needed = np.flatnonzero(_to_score(table, depth) & pc.is_null(table["text"]).to_numpy()).tolist()
    if not needed:
        return table
    names, ids = table["passage_id"].to_pylist(), table["vector_id"].to_pylist()
    spans = _spans(table)
    chosen = _choose_texts(source, needed, names, ids, spans)
    columns = {name: table[name].to_pylist() for name in ("text", "reason", "detail")}
    for i in needed:
        found = chosen.get(i)
        if found is None:
            columns["reason"][i] = "unknown_passage"
            columns["detail"][i] = "the data set has no passage of this id"
        elif found.text is None:
            columns["reason"][i], columns["detail"][i] = "unreadable_text", found.fault
        else:
            columns["text"][i] = found.text
    columns["vector_id"] = ids
    if source.chunking is not None:
        columns |= {name: [span[i] for span in spans] for i, name in enumerate(SPAN_COLUMNS)}
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(
            place, table.schema.field(name), pa.array(values, table.schema.field(name).type)
        )
    return table


def _choose_texts(
    source: TextSource, needed: Sequence[int], names: list[str], ids: list[int | None], spans: list[ChunkSpan]
) -> dict[int, Text]:
    """Return the texts of the rows whose passages are there; puts into ids and spans what was read."""
    chosen: dict[int, Text] = {}

    def choose(rows: Sequence[int], *, whole: bool) -> None:
        texts = source.texts_of(_ascending(ids[i] for i in rows), whole=whole)
        for i in rows:
            place = ids[i]
            found = texts.get(place) if place is not None else None
            if found is None or found.passage_id not in (None, names[i]):
                continue
            if whole or found.span in (NO_SPAN, spans[i]):
                chosen[i] = found

    if source.chunking is None:
        choose(needed, whole=False)
    else:
        choose([i for i in needed if spans[i] != NO_SPAN], whole=False)
        # The id of a vector of another data set leads to the passage, but to a chunk that was not meant.
        rest = [i for i in needed if i not in chosen]
        for i in rest:
            place = ids[i]
            spans[i], ids[i] = NO_SPAN, None if place is None else place & -MAX_CHUNKS_PER_ROW
        choose(rest, whole=True)
    lost = [i for i in needed if i not in chosen]
    places = source.places_of(sorted({names[i] for i in lost})) if lost else {}
    for i in lost:
        ids[i] = places.get(names[i])
    choose(lost, whole=True)
    return chosen


def _spans(table: pa.Table) -> list[ChunkSpan]:
    if not set(SPAN_COLUMNS) <= set(table.column_names):
        return [NO_SPAN] * len(table)
    return list(zip(*(table[name].to_pylist() for name in SPAN_COLUMNS), strict=True))


def _ascending(ids: Iterable[int | None]) -> IdArray:
    return np.unique(np.array([vector_id for vector_id in ids if vector_id is not None], np.int64))


def _to_score(table: pa.Table, depth: int) -> npt.NDArray[np.bool_]:
    """(n,) bool: candidates without a fault among the first ``depth`` of their query."""
    able: npt.NDArray[np.bool_] = pc.is_null(table["reason"]).to_numpy()
    query_ids = whole(table["query_id"]).dictionary_encode().indices.to_numpy()
    # The rows of a query are neighbours, so the rank is the distance from the first of them.
    begins = np.flatnonzero(np.diff(query_ids, prepend=-1))
    rank = np.arange(len(table)) - np.repeat(begins, np.diff(begins, append=len(table)))
    return able & (rank < depth)
