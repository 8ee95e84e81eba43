"""The stages of mining behind the encoder: results and positives judged, and the negatives drawn.

Between the two a teacher may score what is left. A query that cannot be mined for ends as one row with its
reason; a group that cannot be done is given up with an error; only defects raise.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bge_ray.errors import BgeRayError, StorageError
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.mine.likeness import overlap, words
from bge_ray.pipeline.mine.rules import (
    LEFT_OVER,
    NEGATIVE,
    POSITIVE,
    VERDICTS,
    Numbers,
    Results,
    draw,
    highest_allowed,
    judge,
)
from bge_ray.pipeline.rerank.texts import TextSource, add_texts
from bge_ray.pipeline.runs.groups import CANDIDATE_SCHEMA, Workplace
from bge_ray.pipeline.runs.parts import write_part
from bge_ray.pipeline.search.stages import RetrieveJob, retrieve_stage
from bge_ray.records.arrays import dense_rows, whole
from bge_ray.records.ids import FloatArray, IdArray
from bge_ray.records.model import EMBEDDING
from bge_ray.records.schemas import hash_texts
from bge_ray.settings.sections import MineSettings

# Results on their way: ``text`` is what a teacher is to read, ``passage_text`` and ``query_text`` what is
# written; the query's stand with its positives. ``same_text``: as a positive or the query.
RESULT_SCHEMA = pa.schema(
    [
        *CANDIDATE_SCHEMA,
        pa.field("rank", pa.int32()),
        pa.field("cosine", pa.float32()),
        pa.field("overlap", pa.float32()),
        pa.field("same_text", pa.bool_()),
        pa.field("verdict", pa.string()),
        pa.field("query_text", pa.string()),
        pa.field("passage_text", pa.string()),
        pa.field("labels", pa.string()),
    ]
)
MINED_SCHEMA = pa.schema(
    [
        pa.field("row_no", pa.int64(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("passage_id", pa.string()),
        pa.field("vector_id", pa.int64()),
        pa.field("rank", pa.int32()),
        pa.field("score", pa.float64()),
        pa.field("teacher_score", pa.float32()),
        pa.field("cosine", pa.float32()),
        pa.field("overlap", pa.float32()),
        pa.field("verdict", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("query_text", pa.string()),
        pa.field("passage_text", pa.string()),
        pa.field("labels", pa.string()),
    ]
)
# Candidates whose vectors are in memory at once to be judged.
VECTORS_AT_ONCE = 50_000
# Of each verdict, in one unit, and characters of each text.
EXAMPLES, EXAMPLE_CHARS = 2, 300
# As Python objects, of which there are many to a row.
ROWS_AT_ONCE = 10_000

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Mining:
    """What the tasks that judge and draw must know."""

    place: Workplace
    retrieve: RetrieveJob
    texts: TextSource
    rules: MineSettings


def judge_stage(batch: pa.Table, job: Mining) -> pa.Table:
    """Search for the queries of a group, and judge each result beside the positives: RESULT_SCHEMA."""
    asked = Parcel.from_batch(batch)
    found = Parcel.from_batch(retrieve_stage(batch, job.retrieve))
    if asked.table is None or found.table is None:
        return found.to_batch()
    started = time.time()
    try:
        table = _with_positives(asked.table, found.table, job)
        table = add_texts(table, job.texts, len(table))
    except BgeRayError as error:
        return found.failed(str(error)).to_batch()
    texts_s = time.time() - started
    judged = _for_each_query(table, lambda rows: _judged(rows, job.rules), RESULT_SCHEMA)
    return found.filled(judged, texts_s=texts_s, judge_s=time.time() - started - texts_s).to_batch()


def draw_stage(batch: pa.Table, job: Mining) -> pa.Table:
    """Draw the negatives of each query of a unit, and write its part: MINED_SCHEMA."""
    parcel = Parcel.from_batch(batch)
    if parcel.table is None:
        return batch
    counts: Counter[str] = Counter()
    examples: list[Row] = []

    def drawn(rows: list[Row]) -> list[Row]:
        rows = _drawn(rows, job.rules)
        counts.update(_counted(rows, job.rules))
        examples.extend(_examples(rows, examples))
        for row in rows:
            row["teacher_score"], row["score"] = row["score"], row["first_score"]
            if row["verdict"] not in (POSITIVE, NEGATIVE):
                row["passage_text"] = None
        return rows

    table = _for_each_query(parcel.table, drawn, MINED_SCHEMA)
    return write_part(parcel.filled(table, **counts, mined_examples=examples), table, job.place)


def _with_positives(queries: pa.Table, found: pa.Table, job: Mining) -> pa.Table:
    """Return results and positives with what the stored vectors say of them, best results first.

    Args:
        queries: rows of QUESTION_SCHEMA with their vectors; those with a reason have none.
        found: what the search found for them, rows of CANDIDATE_SCHEMA.
        job: says where the data set is.
    """
    results: dict[int, list[Row]] = {}
    columns = ["row_no", "query_id", "passage_id", "vector_id", "reason", "detail"]
    unable = found.filter(pc.is_valid(found["reason"])).select(columns).to_pylist()
    for row in found.filter(pc.is_null(found["reason"])).select(columns).to_pylist():
        results.setdefault(row["row_no"], []).append(row)
    asked = queries.filter(pc.is_in(queries["row_no"], pa.array(list(results), pa.int64())))
    vectors = dense_rows(asked[EMBEDDING]).astype(np.float32)
    places = _places(asked, job.texts)
    step = max(1, VECTORS_AT_ONCE // max(map(len, results.values()), default=1))
    tables = [pa.Table.from_pylist(unable, schema=RESULT_SCHEMA)]
    for start in range(0, len(asked), step):
        some = asked.drop_columns([EMBEDDING]).slice(start, step).to_pylist()
        ids = [row["vector_id"] for query in some for row in results[query["row_no"]]]
        ids += [places[name] for query in some for name in query["positives"] if name in places]
        stored = _Stored.read(job, np.unique(np.array(ids, np.int64)))
        rows = [
            row
            for query, vector in zip(some, vectors[start : start + step], strict=True)
            for row in _of_query(query, vector, results[query["row_no"]], places, stored)
        ]
        tables.append(pa.Table.from_pylist(rows, schema=RESULT_SCHEMA))
    table = pa.concat_tables(tables)
    return table.take(pa.array(np.argsort(table["row_no"].to_numpy(), kind="stable")))


def _places(queries: pa.Table, texts: TextSource) -> dict[str, int]:
    """Return the vector id of each positive that the data set has, by its id or its text."""
    named: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for by_text, positives in zip(
        queries["by_text"].to_pylist(), queries["positives"].to_pylist(), strict=True
    ):
        named[by_text].update(dict.fromkeys(positives))
    places = texts.places_of(list(named[False])) if named[False] else {}
    return places | (texts.places_of_texts(list(named[True])) if named[True] else {})


@dataclass(frozen=True)
class _Stored:
    """What the shards hold of some passages: (n,) ascending ids and (n, dim) vectors."""

    ids: IdArray
    passage_ids: list[str]
    hashes: list[bytes]
    vectors: FloatArray
    instruction: str

    @staticmethod
    def read(job: Mining, ids: IdArray) -> "_Stored":
        table = job.retrieve.stored.places(ids, ["passage_id", "text_hash", EMBEDDING])
        if len(table) != len(ids):
            lacking = f"lacks {len(ids) - len(table)} of {len(ids)} passages that it had"
            raise StorageError(f"the data set {lacking}; run bge-ray embed again")
        return _Stored(
            ids=table["vector_id"].to_numpy(),
            passage_ids=table["passage_id"].to_pylist(),
            hashes=table["text_hash"].to_pylist(),
            vectors=dense_rows(whole(table[EMBEDDING])).astype(np.float32),
            instruction=job.texts.instruction,
        )

    def at(self, ids: Sequence[int]) -> npt.NDArray[np.int64]:
        return np.searchsorted(self.ids, np.array(ids, np.int64))


def _of_query(
    query: Row, vector: FloatArray, results: list[Row], places: dict[str, int], stored: _Stored
) -> list[Row]:
    """Return the positives of a query, then its results, each with its score by the stored vectors."""
    base = {"row_no": query["row_no"], "query_id": query["query_id"], "query": query["query"]}
    rows = [
        {**base, **_unknown(name, number, by_text=query["by_text"])}
        for number, name in enumerate(query["positives"])
        if name not in places
    ]
    known = [places[name] for name in query["positives"] if name in places]
    if not known:
        detail = f"none of its {len(rows)} positives is in the data set"
        return [*rows, {**base, "reason": "unknown_positive", "detail": detail}]
    # Of a passage that was embedded twice, the one that was found is the positive.
    found = {row["passage_id"]: row["vector_id"] for row in results}
    names = (stored.passage_ids[place] for place in stored.at(known))
    wanted = {found.get(name, place) for name, place in zip(names, known, strict=True)}
    others = [row["vector_id"] for row in results if row["vector_id"] not in wanted]
    positives = stored.at(sorted(wanted))
    at = np.concatenate([positives, stored.at(others)])
    # One product a row, so that a score does not depend on what else is scored.
    scores = (stored.vectors[at] * vector).sum(axis=1, dtype=np.float64)
    cosines = (stored.vectors[at] @ stored.vectors[positives].T).max(axis=1)
    same = {stored.hashes[place] for place in positives}
    same.update(hash_texts([f"{stored.instruction}{query['query']}"]).to_pylist())
    listed, rank = set(found.values()), 0
    of_positives, of_others = [], []
    for i in sorted(range(len(at)), key=lambda i: (-scores[i], stored.passage_ids[at[i]])):
        vector_id, positive = int(stored.ids[at[i]]), i < len(positives)
        rank += vector_id in listed
        row = {
            **base,
            "passage_id": stored.passage_ids[at[i]],
            "vector_id": vector_id,
            "first_score": float(scores[i]),
            "rank": rank if vector_id in listed else None,
        }
        if positive:
            of_positives.append({**row, "verdict": POSITIVE, "labels": query["labels"]})
        else:
            of_others.append({**row, "cosine": float(cosines[i]), "same_text": stored.hashes[at[i]] in same})
    return [*rows, *of_positives, *of_others]


def _unknown(name: str, number: int, *, by_text: bool) -> Row:
    if by_text:
        detail = f"the data set has no passage with this text: {name[:EXAMPLE_CHARS]}"
        return {"passage_id": f"pos-{number}", "reason": "unknown_positive", "detail": detail}
    return {
        "passage_id": name,
        "reason": "unknown_positive",
        "detail": "the data set has no passage of this id",
    }


def _judged(rows: list[Row], rules: MineSettings) -> list[Row]:
    """Return the rows of a query with their verdicts; only what may yet be a negative keeps a ``text``."""
    positives = [row for row in rows if row["verdict"] == POSITIVE and row["reason"] is None]
    results = [row for row in rows if row["verdict"] is None and row["reason"] is None]
    if not positives:
        return _given_up(rows, "unknown_positive", "the texts of its positives cannot be read")
    known = [words(row["text"]) for row in positives]
    for row in results:
        own = words(row["text"])
        row["overlap"] = max(overlap(own, of_positive) for of_positive in known)
    verdicts = judge(
        Results(
            same_text=np.array([row["same_text"] for row in results], np.bool_),
            cosines=_column(results, "cosine"),
            overlaps=_column(results, "overlap"),
            scores=_column(results, "first_score"),
            ranks=np.array([row["rank"] for row in results], np.int64),
            positive_scores=_column(positives, "first_score"),
        ),
        rules,
    )
    for row, verdict in zip(results, verdicts, strict=True):
        row["verdict"] = verdict
    for row in rows:
        row["passage_text"] = row["text"]
        if row["verdict"] not in (POSITIVE, None):
            row["text"] = None
    for row in positives:
        row["query_text"] = row["query"]
    return rows


def _drawn(rows: list[Row], rules: MineSettings) -> list[Row]:
    """Return the rows of a query, each that has no fault with its last verdict."""
    if _is_rejected(rows):
        return rows
    able = [row for row in rows if row["reason"] is None]
    positives = [row for row in able if row["verdict"] == POSITIVE]
    left = [row for row in able if row["verdict"] is None]
    ordered_by = "score" if rules.teacher else "first_score"
    if not positives:
        return _given_up(rows, "unscored_positive", "the teacher has no score of its positives")
    if rules.teacher:
        margins = (rules.teacher_relative_margin, rules.teacher_absolute_margin)
        bound = highest_allowed(_column(positives, "score"), *margins)
        for row in left:
            row["verdict"] = "teacher_margin" if row["score"] > bound else None
        left = [row for row in left if row["verdict"] is None]
    chosen = draw(rows[0]["query_id"], [row["passage_id"] for row in left], _column(left, ordered_by), rules)
    for row in left:
        row["verdict"] = LEFT_OVER
    for place in chosen:
        left[place]["verdict"] = NEGATIVE
    if chosen:
        return rows
    results = sum(row["verdict"] != POSITIVE for row in able)
    return [*rows, _rejection(rows, "no_negative", f"the rules left none of {results} results")]


def _counted(rows: list[Row], rules: MineSettings) -> dict[str, int]:
    """Return what a query adds to the counts of a run."""
    verdicts = Counter(row["verdict"] for row in rows if row["verdict"] is not None and not row["reason"])
    positives = [row for row in rows if row["verdict"] == POSITIVE and not row["reason"]]
    negatives = verdicts[NEGATIVE]
    unknown = sum(row["reason"] == "unknown_positive" and row["passage_id"] is not None for row in rows)
    return {
        **{f"verdict_{verdict}": verdicts[verdict] for verdict in VERDICTS},
        "positives_beyond": sum(row["rank"] is None for row in positives),
        "positives_unknown": unknown,
        "mined_queries": int(negatives > 0),
        "short_queries": int(0 < negatives < rules.negatives),
    }


def _examples(rows: list[Row], there: list[Row]) -> list[Row]:
    """Return a few results of each verdict with their texts, fewer where some are there."""
    shown = Counter(example["verdict"] for example in there)
    positives = [row for row in rows if row["verdict"] == POSITIVE and row["query_text"] is not None]
    found = []
    for row in rows if positives else ():
        verdict = row["verdict"]
        if row["reason"] is not None or verdict in (None, POSITIVE) or shown[verdict] >= EXAMPLES:
            continue
        shown[verdict] += 1
        best = positives[0]
        texts = {
            "query": best["query_text"],
            "positive": best["passage_text"],
            "passage": row["passage_text"],
        }
        found.append(
            {
                **{name: (text or "")[:EXAMPLE_CHARS] for name, text in texts.items()},
                "verdict": verdict,
                "query_id": row["query_id"],
                "positive_id": best["passage_id"],
                "passage_id": row["passage_id"],
                "positive_score": best["first_score"],
                "score": row["first_score"],
                "cosine": row["cosine"],
                "overlap": row["overlap"],
            }
        )
    return found


def _given_up(rows: list[Row], reason: str, detail: str) -> list[Row]:
    """Return what is to be said of a query that cannot be mined for: its faults, not its results."""
    faults = [row for row in rows if row["reason"] is not None]
    return faults if _is_rejected(rows) else [*faults, _rejection(rows, reason, detail)]


def _is_rejected(rows: list[Row]) -> bool:
    """Tell whether a query has a row of its own that says why it cannot be mined for."""
    return any(row["reason"] is not None and row["passage_id"] is None for row in rows)


def _rejection(rows: list[Row], reason: str, detail: str) -> Row:
    empty = dict.fromkeys(rows[0])
    return {**empty, "row_no": rows[0]["row_no"], "query_id": rows[0]["query_id"]} | {
        "reason": reason,
        "detail": detail,
    }


def _for_each_query(table: pa.Table, change: Callable[[list[Row]], list[Row]], schema: pa.Schema) -> pa.Table:
    """Return a table of what becomes of the rows of each query, which are neighbours, some at a time."""
    starts = np.flatnonzero(np.diff(table["row_no"].to_numpy(), prepend=-1))
    tables = [schema.empty_table()]
    for some in np.array_split(starts, -(-len(table) // ROWS_AT_ONCE)) if len(table) else ():
        if not len(some):
            continue
        after = starts[starts > some[-1]]
        stop = int(after[0]) if len(after) else len(table)
        rows = table.slice(int(some[0]), stop - int(some[0])).to_pylist()
        groups = itertools.groupby(rows, key=lambda row: row["row_no"])
        changed = [row for _, group in groups for row in change(list(group))]
        tables.append(pa.Table.from_pylist(changed, schema=schema))
    return pa.concat_tables(tables)


def _column(rows: list[Row], name: str) -> Numbers:
    return np.array([row[name] for row in rows], np.float64)
