"""What several finders found to one ranking: fused, or scored again by what is stored of each candidate.

What is fused is passages (or chunks, where these are results). What is scored again is vectors: of the chunks
of a passage that some finder found the best one counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bge_ray.index.fusion import Fusion, fuse, ranks
from bge_ray.index.scores import weighted_scores
from bge_ray.pipeline.runs.holders import StoredRows
from bge_ray.pipeline.search.finders import score_column
from bge_ray.pipeline.search.retrieve import Found
from bge_ray.records.arrays import whole
from bge_ray.records.ids import IdArray
from bge_ray.records.outputs import Output

FUSED = "fused_score"


@dataclass(frozen=True)
class Rescoring:
    """By which outputs candidates are scored again, and how much each of them weighs."""

    outputs: tuple[Output, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Combining:
    """How the candidates of finders, named by their outputs, become ``k`` results a query.

    ``fusion`` is None where there is one finder, ``rescoring`` where nothing is scored again; one of them is
    there.
    """

    found_by: tuple[str, ...]
    k: int
    fusion: Fusion | None
    rescoring: Rescoring | None

    @property
    def columns(self) -> tuple[str, ...]:
        """The scores beside that of the result: one an output, and the fused one where it is not that."""
        again = () if self.rescoring is None else tuple(o.name for o in self.rescoring.outputs)
        fused = (FUSED,) if self.fusion is not None and self.rescoring is not None else ()
        return (*(score_column(name) for name in dict.fromkeys((*self.found_by, *again))), *fused)


@dataclass(frozen=True)
class Ranking:
    """Results (r,) of n queries, by query, best first: ``numbers`` of the queries, ``scores`` float64.

    ``rows`` has ``vector_id``, ``passage_id``, the columns that were asked for, and the scores of
    `Combining.columns`, null where there is none.
    """

    numbers: IdArray
    scores: npt.NDArray[np.float64]
    rows: pa.Table


@dataclass(frozen=True)
class _Entries:
    """What all finders found, one entry each: (e,) arrays, and what they are together.

    ``item_of`` is which of m items (a passage of a query, or a chunk of it) an entry is; ``scores`` are (m,)
    by name, NaN where a finder did not find it; ``first`` the entry that stands for each item.
    """

    numbers: IdArray
    rows: pa.Table
    item_of: IdArray
    first: IdArray
    scores: dict[str, npt.NDArray[np.float64]]


def combine(
    found: Sequence[Found], queries: pa.Table, stored: StoredRows, how: Combining, *, by_passage: bool
) -> Ranking:
    """Make one ranking of what the finders found.

    Args:
        found: by each finder, in the order of their names.
        queries: n rows, with a column for each output that scores again.
        stored: what the data set holds of the candidates.
        how: to combine.
        by_passage: a result is a passage, and no chunk of it.

    Raises:
        StorageError: a shard is missing or damaged.
    """
    entries = _gather(found, how, by_passage=by_passage)
    if how.rescoring is None:
        chosen = entries.first
        scores = {name: entries.scores[name] for name in how.columns}
        total = entries.scores[FUSED]
    else:
        ids = entries.rows["vector_id"].to_numpy()
        _, codes = np.unique(ids, return_inverse=True)
        _, first = np.unique(_pairs(entries.numbers, codes), return_index=True)
        chosen = np.sort(first).astype(np.int64)
        again = stored.output_scores(how.rescoring.outputs, queries, entries.numbers[chosen], ids[chosen])
        total = weighted_scores(list(again.values()), how.rescoring.weights).astype(np.float64)
        items = entries.item_of[chosen]
        exact = {score_column(name): values.astype(np.float64) for name, values in again.items()}
        scores = {name: exact[name] if name in exact else entries.scores[name][items] for name in how.columns}
    best = _ranked(entries, chosen, total, how.k)
    rows = entries.rows.take(pa.array(chosen[best]))
    for name in how.columns:
        values = scores[name][best].astype(np.float32)
        rows = rows.append_column(name, pa.array(values, pa.float32(), mask=np.isnan(values)))
    return Ranking(entries.numbers[chosen[best]], total[best], rows)


def _gather(found: Sequence[Found], how: Combining, *, by_passage: bool) -> _Entries:
    """Lay what all finders found side by side, and say which entries are of one passage of one query."""
    numbers = np.concatenate([part.numbers for part in found])
    rows = pa.concat_tables([part.rows for part in found], promote_options="permissive")
    named = whole(rows["passage_id" if by_passage else "vector_id"]).dictionary_encode().indices.to_numpy()
    _, first, item_of = np.unique(_pairs(numbers, named), return_index=True, return_inverse=True)
    n_items = len(first)
    scores: dict[str, npt.NDArray[np.float64]] = {}
    start = 0
    for name, part in zip(how.found_by, found, strict=True):
        values = np.full(n_items, np.nan)
        values[item_of[start : start + len(part.numbers)]] = part.scores
        scores[score_column(name)] = values
        start += len(part.numbers)
    first = first.astype(np.int64)
    if how.fusion is not None:
        gains = fuse([(part.numbers, part.scores) for part in found], how.fusion)
        scores[FUSED] = np.bincount(item_of, np.concatenate(gains), minlength=n_items).astype(np.float64)
        rank = np.concatenate([ranks(part.numbers) for part in found])
        # Of one passage by several chunks, that of the best rank; of equal ones the first finder's.
        order = np.lexsort((np.arange(len(rank)), rank, item_of))
        first = order[np.searchsorted(item_of[order], np.arange(n_items))]
    return _Entries(numbers, rows, item_of, first, scores)


def _pairs(numbers: IdArray, codes: IdArray) -> IdArray:
    """Return one number for each pair of a query's number and a code, which counts from 0 on."""
    return numbers.astype(np.int64) * (int(codes.max(initial=0)) + 1) + codes


def _ranked(entries: _Entries, chosen: IdArray, total: npt.NDArray[np.float64], k: int) -> IdArray:
    """Return which of (c,) chosen entries are the k results of each query, by query, best first.

    Ties go by passage id, then by vector id; of the entries of one item the best counts.
    """
    rows = entries.rows.take(pa.array(chosen))
    table = pa.table(
        {
            "query": entries.numbers[chosen],
            "score": total,
            "passage_id": rows["passage_id"],
            "vector_id": rows["vector_id"],
        }
    )
    order = [("query", "ascending"), ("score", "descending"), ("passage_id", "ascending")]
    best = pc.sort_indices(table, [*order, ("vector_id", "ascending")]).to_numpy().astype(np.int64)
    _, first = np.unique(entries.item_of[chosen[best]], return_index=True)
    best = best[np.sort(first)]
    kept: IdArray = best[ranks(entries.numbers[chosen[best]]) < k]
    return kept
