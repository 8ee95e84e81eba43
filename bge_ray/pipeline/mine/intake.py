"""The queries of a mining run with their positives, from queries and judgements or from training examples."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from bge_ray.errors import CorpusError
from bge_ray.formats.qrels import read_qrels
from bge_ray.formats.queries import read_queries
from bge_ray.formats.rows import folded
from bge_ray.formats.training import read_examples
from bge_ray.pipeline.runs.groups import QUERY_SCHEMA
from bge_ray.pipeline.runs.intake import Block, Rejections
from bge_ray.settings.sections import Settings
from bge_ray.storage.objects import Storage

# ``positives`` are passage ids, or (``by_text``) texts; ``labels`` is JSON that goes with the query.
QUESTION_SCHEMA = pa.schema(
    [
        *QUERY_SCHEMA,
        pa.field("positives", pa.list_(pa.string()), nullable=False),
        pa.field("by_text", pa.bool_(), nullable=False),
        pa.field("labels", pa.string()),
    ]
)


class Questions:
    """Reads what a mining run asks; ``unjudged`` counts queries without a judgement, which are passed by."""

    def __init__(self, storage: Storage, settings: Settings) -> None:
        """Look whether all inputs are there, and read the judgements, if there are any.

        Raises:
            CorpusError: one is not there or unreadable, or no judgement is above 0.
        """
        self._storage, self._settings = storage, settings
        self.unjudged = 0
        self._positives: dict[str, list[str]] = {}
        for key in ("queries", "input", "held_out"):
            uri = getattr(settings.mine, key)
            if uri is not None and not storage.list_files(uri):
                raise CorpusError(f"mine.{key} {uri}: no such file or folder, or an empty one")
        qrels = settings.mine.qrels
        if qrels is not None:
            judged = read_qrels(storage, qrels)
            self._positives = {
                query_id: [passage_id for passage_id, relevance in found.items() if relevance > 0]
                for query_id, found in judged.items()
            }
            if not any(self._positives.values()):
                raise CorpusError(
                    f"mine.qrels {qrels}: judges no passage above 0, so no query has a positive"
                )

    def blocks(self, rejections: Rejections, watch: Callable[[], None]) -> Iterator[Block]:
        """Yield the queries that have positives, one by one.

        Raises:
            CorpusError: the input is unreadable, or no query in it has a positive.
        """
        held_out = self._held_out()
        read = 0
        for question in self._examples(rejections) if self._by_example else self._judged(rejections):
            watch()
            (query_id,), (query,) = question["query_id"], question["query"]
            if folded(query) in held_out:
                rejections.add(query_id, None, "held_out", "mine.held_out has a query of the same text")
                continue
            read += 1
            yield question
        if not read:
            raise CorpusError(
                f"mine: no query is left to be mined for; {self.unjudged:,} have no judgement, "
                f"{len(rejections):,} were left out ({', '.join(sorted(set(rejections.reasons)))})"
            )

    @property
    def _by_example(self) -> bool:
        return self._settings.mine.input is not None

    def _judged(self, rejections: Rejections) -> Iterator[Block]:
        asked = self._settings.search
        missing = dict.fromkeys(self._positives)
        self.unjudged = 0
        uri = str(self._settings.mine.queries)
        for batch in read_queries(self._storage, uri, asked.id_column, asked.text_column):
            for row in batch.rejected:
                rejections.add(row.passage_id, None, row.reason, f"{batch.uri} row {row.row}: {row.detail}")
            for query_id, text in zip(batch.query_ids, batch.texts, strict=True):
                missing.pop(query_id, None)
                found = self._positives.get(query_id)
                if found:
                    yield _question(query_id, text, found, by_text=False, labels={})
                elif found is None:
                    self.unjudged += 1
                else:
                    rejections.add(query_id, None, "no_positive", "mine.qrels judges nothing of it above 0")
        for query_id in missing:
            rejections.add(query_id, None, "unknown_query", "mine.queries has no query of this id")

    def _examples(self, rejections: Rejections) -> Iterator[Block]:
        for found in read_examples(self._storage, str(self._settings.mine.input), rejections.add):
            by_text = not found.passage_ids
            positives = [text.strip() for text in found.texts] if by_text else found.passage_ids
            yield _question(
                found.query_id, found.query.strip(), positives, by_text=by_text, labels=found.labels
            )

    def _held_out(self) -> set[str]:
        asked, uri = self._settings.search, self._settings.mine.held_out
        if uri is None:
            return set()
        batches = read_queries(self._storage, uri, asked.id_column, asked.text_column)
        return {folded(text) for batch in batches for text in batch.texts}


def _question(
    query_id: str, query: str, positives: list[str], *, by_text: bool, labels: dict[str, Any]
) -> Block:
    return {
        "query_id": [query_id],
        "query": [query],
        "positives": [list(dict.fromkeys(positives))],
        "by_text": [by_text],
        "labels": [json.dumps(labels, sort_keys=True, ensure_ascii=False) if labels else None],
    }
