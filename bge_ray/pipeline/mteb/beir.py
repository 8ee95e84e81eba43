"""A folder in the BEIR layout as a retrieval task of mteb: corpus, queries and judgements, on any storage."""

import logging
import re
from collections.abc import Iterator
from typing import Any

from bge_ray.errors import CorpusError
from bge_ray.formats.corpus import list_corpus, read_units, resolve_columns, scan_object
from bge_ray.formats.qrels import read_qrels
from bge_ray.formats.queries import read_queries
from bge_ray.formats.rows import Passages, check_rows
from bge_ray.pipeline.mteb.package import mteb
from bge_ray.records.canonical import digest
from bge_ray.records.plan import UnitLimits, span_units
from bge_ray.settings.sections import CorpusSettings
from bge_ray.storage.objects import ObjectInfo, Storage
from bge_ray.storage.ownership import digest_object

logger = logging.getLogger(__name__)

_LIMITS = UnitLimits(max_rows=50_000, max_bytes=96_000_000, vector_bytes=0)
# Of several files of judgements the first of these is measured, as BEIR does.
_SPLITS = ("test", "dev")
_QRELS = re.compile(r"/qrels/([^/]+)\.[^/]+$")


def beir_task(storage: Storage, uri: str) -> Any:
    """Return a folder as a task whose name is the folder's; its data is read when mteb loads it.

    The revision is a hash over the bytes of corpus, queries and judgements.

    Raises:
        CorpusError: the folder lacks one of them, has several files of judgements none of which is test or
            dev, or judges none of its queries.
    """
    qrels, split = _find_qrels(storage, uri)
    corpus = list_corpus(storage, CorpusSettings(uri=uri))
    queries = [info for info in storage.list_files(uri) if _is_queries(info)]
    if not queries:
        raise CorpusError(f"mteb.beir {uri}: has no queries.jsonl beside its corpus")
    _judged(storage, uri, queries, qrels)  # now, and not after hours of other tasks
    hashes = [digest_object(storage, info) for info in (*corpus, *queries, qrels)]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", uri.rstrip("/").rpartition("/")[2]) or "corpus"

    class BeirTask(mteb.abstasks.AbsTaskRetrieval):  # type: ignore[misc]
        metadata = mteb.TaskMetadata(
            name=name,
            description=f"The retrieval task of the folder {name}, in the BEIR layout.",
            dataset={"path": "local", "revision": digest(hashes)[:16]},
            type="Retrieval",
            category="t2t",
            eval_splits=[split],
            # A folder does not say; no score depends on it.
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, num_proc: int | None = None, **_: Any) -> None:  # noqa: ARG002 - as mteb calls it
            """Read the folder."""
            self.dataset = {"default": {split: _read(storage, uri, queries, qrels)}}
            self.data_loaded = True

    return BeirTask()


def _find_qrels(storage: Storage, uri: str) -> tuple[ObjectInfo, str]:
    found = {}
    for info in storage.list_files(f"{uri.rstrip('/')}/qrels"):
        if (match := _QRELS.search(info.uri)) is not None:
            found[match[1]] = info
    split = next((name for name in _SPLITS if name in found), None)
    if split is None and len(found) == 1:
        split = next(iter(found))
    if split is None:
        there = f"has several ({', '.join(sorted(found))})" if found else "there is none"
        raise CorpusError(f"mteb.beir {uri}: needs judgements in qrels/test.tsv or dev.tsv; {there}")
    return found[split], split


def _is_queries(info: ObjectInfo) -> bool:
    return info.uri.rpartition("/")[2].partition(".")[0] == "queries"


def _judged(
    storage: Storage, uri: str, queries: list[ObjectInfo], qrels: ObjectInfo
) -> tuple[dict[str, list[str]], dict[str, dict[str, int]]]:
    """Return queries by column, and the judgements of those that have some.

    Raises:
        CorpusError: a file cannot be read, or no query is judged.
    """
    asked: dict[str, list[str]] = {"id": [], "text": []}
    for info in queries:
        for batch in read_queries(storage, info.uri):
            asked["id"] += batch.query_ids
            asked["text"] += batch.texts
    known = set(asked["id"])
    judged = {name: found for name, found in read_qrels(storage, qrels.uri).items() if name in known}
    if not judged:
        raise CorpusError(f"mteb.beir {uri}: no query of {qrels.uri} is among its queries")
    return asked, judged


def _read(storage: Storage, uri: str, queries: list[ObjectInfo], qrels: ObjectInfo) -> dict[str, Any]:
    """Return a split as mteb holds it."""
    from datasets import Dataset

    asked, judged = _judged(storage, uri, queries, qrels)
    corpus: dict[str, list[str]] = {"id": [], "title": [], "text": []}
    for passages in _passages(storage, uri):
        corpus["id"] += passages.passage_ids
        corpus["title"] += passages.titles
        corpus["text"] += passages.bodies
    return {
        "corpus": Dataset.from_dict(corpus),
        "queries": Dataset.from_dict(asked),
        "relevant_docs": judged,
        "top_ranked": None,
    }


def _passages(storage: Storage, uri: str) -> Iterator[Passages]:
    """Yield the passages of a corpus that can be embedded, unit by unit."""
    settings = CorpusSettings(uri=uri)
    scanned = [scan_object(storage, info, settings, _LIMITS) for info in list_corpus(storage, settings)]
    columns = resolve_columns(scanned, settings)
    left_out = 0
    for number, one in enumerate(scanned):
        found = one.under(number)
        for span in found.spans:
            todo = {unit.first_row for unit in span_units(number, span)}
            for _, rows in read_units(storage, found, span, columns, todo):
                passages, rejected = check_rows(rows)
                left_out += len(rejected)
                yield passages
    if left_out:
        logger.warning("mteb.beir %s: %d rows of its corpus cannot be used and are left out", uri, left_out)
