"""Passages by the best of their chunks, and chunks: against numpy over all chunks; without Ray."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

import bge_ray
from bge_ray.dataset.lookup import ShardMap
from bge_ray.errors import ModelError, SettingsError
from bge_ray.index.search import search
from bge_ray.pipeline.runs.holders import RowHolder
from bge_ray.pipeline.runs.source import Source
from bge_ray.pipeline.search.exact import ShardSearcher
from bge_ray.pipeline.search.job import SearchJob
from bge_ray.pipeline.search.retrieve import Found, Search, plan_retrieval, retrieve
from bge_ray.records.canonical import to_json
from bge_ray.records.ids import vector_ids
from bge_ray.records.index import SHARD_DIGITS, IndexDescription
from bge_ray.retrieval import Hit
from bge_ray.storage.objects import Storage
from tests.report.samples import index_description
from tests.support.searches import settings_for
from tests.support.vectors import CHUNK_CHARS, CHUNKING, VectorDataset, clustered

DIM = 32
QUERIES = clustered(12, DIM, seed=99)
STORAGE = Storage(5)


class Chunked:
    """Passages of many chunks in two objects, some of equal vectors; passage p00 stands in both objects."""

    def __init__(self, root: Path, crowd: int = 40) -> None:
        rng = np.random.default_rng(5)
        self.sizes = [[crowd, *rng.integers(1, 9, 30).tolist()], rng.integers(1, 30, 20).tolist()]
        self.names = [[f"p{i:02d}" for i in range(31)], ["p00", *(f"p{i}" for i in range(40, 59))]]
        made = VectorDataset(str(root), DIM, chunking=CHUNKING)
        self.vectors, self.rows = [], []
        for number, (sizes, names) in enumerate(zip(self.sizes, self.names, strict=True)):
            vectors = clustered(sum(sizes), DIM, seed=number)
            if not number:  # the first passage is near every query, three others begin with the same chunk
                near = QUERIES[rng.integers(0, len(QUERIES), crowd)] + 0.02 * clustered(crowd, DIM, seed=7)
                vectors[:crowd] = near / np.linalg.norm(near, axis=1, keepdims=True)
                vectors[(np.cumsum(sizes) - sizes)[[4, 9, 20]]] = QUERIES[0]
            made.put(number, vectors, names, sizes)
            self.vectors.append(vectors)
            for row, size in enumerate(sizes):
                self.rows += [(names[row], number, row, chunk) for chunk in range(size)]
        self.manifest = made.publish()
        self.source = Source(STORAGE, str(root), made.spec, self.manifest)

    @property
    def matrix(self) -> np.ndarray:
        return np.concatenate(self.vectors)

    @property
    def ids(self) -> np.ndarray:
        return np.array([int(vector_ids(o, np.array([r]), c)[0]) for _, o, r, c in self.rows])

    def brute(self, k: int, group: str) -> list[list[tuple[str, int]]]:
        """(passage id, vector id) of the k best passages or chunks, ties by passage id."""
        matrix = self.matrix.astype(np.float64)
        matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
        ids, found = self.ids, []
        for query in QUERIES:
            scores = (matrix * query.astype(np.float64)).sum(axis=1).astype(np.float32)
            ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], self.rows[i][0], ids[i]))
            best: dict[Any, int] = {}
            for i in ranked:
                best.setdefault(self.rows[i][0] if group == "passage" else i, i)
            found.append([(self.rows[i][0], int(ids[i])) for i in list(best.values())[:k]])
        return found

    def index(self, factory: str) -> tuple[IndexDescription, Search]:
        made = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
        made.train(self.matrix)
        outer = made if factory.startswith("IVF") else faiss.IndexIDMap(made)
        outer.add_with_ids(self.matrix, self.ids)
        nlist = made.nlist if factory.startswith("IVF") else 0
        parameter = "nprobe" if nlist else None
        described = index_description(
            ntotal=len(self.ids), dim=DIM, nlist=nlist, parameter=parameter, effort=1
        )
        return described, lambda queries, k, effort: search(outer, queries, k, effort=effort)

    def exactly(self, *, per_row: bool) -> Search:
        shards = ShardMap.of(self.manifest)
        return ShardSearcher(STORAGE, self.source.root, shards, 1, per_row=per_row).search

    @property
    def stored(self) -> RowHolder:
        return RowHolder(STORAGE, self.source.root, ShardMap.of(self.source.manifest))


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory) -> Chunked:
    return Chunked(tmp_path_factory.mktemp("chunked") / "data")


def results(found: Found) -> list[list[tuple[str, int]]]:
    """(passage id, vector id) by query, checking the order, the spans, and that scores are of the columns."""
    by_query: list[list[tuple[str, int]]] = [[] for _ in QUERIES]
    last = (-1, np.inf)
    for number, score, row in zip(found.numbers, found.scores, found.rows.to_pylist(), strict=True):
        assert number > last[0] or score <= last[1]
        last = (number, score)
        by_query[number].append((row["passage_id"], row["vector_id"]))
        assert row["chunk_no"] == row["vector_id"] & 8191
        assert (row["start"], row["end"]) == (
            CHUNK_CHARS * row["chunk_no"],
            CHUNK_CHARS * (row["chunk_no"] + 1),
        )
    return by_query


@pytest.mark.parametrize("group", ["passage", "chunk"])
@pytest.mark.parametrize("k", [1, 7, 50, 1000])
def test_an_exact_search_is_brute_force_over_all_chunks(chunked: Chunked, k: int, group: Any) -> None:
    """50 passages are in it; k beyond them gives all, after one question a passage search."""
    how = plan_retrieval(chunked.source, None, k, 0, group=group)
    found = retrieve(QUERIES, chunked.exactly(per_row=how.per_row), how, chunked.stored)
    assert results(found) == chunked.brute(k, group)
    assert found.unknown == 0


@pytest.mark.parametrize(("factory", "rescored"), [("Flat", 0), ("IVF8,Flat", 0), ("IVF8,SQ8", 60)])
@pytest.mark.parametrize("k", [1, 7, 50])
def test_an_index_fills_every_place_with_another_passage(
    chunked: Chunked, k: int, factory: str, rescored: int
) -> None:
    """The crowd fills the first candidates of every query; all lists are probed, so nothing is missed."""
    described, search_index = chunked.index(factory)
    how = plan_retrieval(chunked.source, described, k, max(k, rescored) if rescored else 0, effort=8)
    found = retrieve(QUERIES, search_index, how, chunked.stored)
    truth = chunked.brute(k, "passage")
    if not rescored:
        assert results(found) == truth
    assert [len({name for name, _ in rows}) for rows in results(found)] == [k] * len(QUERIES)
    close = [len(set(a) & set(b)) for a, b in zip(results(found), truth, strict=True)]
    assert sum(close) >= 0.97 * k * len(QUERIES)
    # From one list of eight the places are filled, too.
    narrow = plan_retrieval(chunked.source, described, k, 0, effort=1)
    filled = retrieve(QUERIES, search_index, narrow, chunked.stored)
    assert {len(rows) for rows in results(filled)} == {k}


def test_a_passage_with_8000_chunks_leaves_room_for_others_and_costs_few_questions(tmp_path: Path) -> None:
    chunked = Chunked(tmp_path / "data", crowd=8000)
    described, search_index = chunked.index("Flat")
    asked: list[int] = []

    def counted(queries: np.ndarray, k: int, effort: int | None) -> Any:
        asked.append(k)
        return search_index(queries, k, effort)

    truth = chunked.brute(10, "passage")
    how = plan_retrieval(chunked.source, described, 10, 0)
    found = retrieve(QUERIES, counted, how, chunked.stored)
    assert results(found) == truth
    assert found.refilled == len(QUERIES)
    assert len(asked) <= 6 and asked == sorted(asked)
    how = plan_retrieval(chunked.source, described, 1000, 0)
    assert how.k == chunked.manifest.rows_out == 51  # nobody asks for passages that are not there
    how = plan_retrieval(chunked.source, None, 10, 0)
    exact = retrieve(QUERIES, chunked.exactly(per_row=True), how, chunked.stored)
    assert results(exact) == truth
    assert exact.refilled <= len(QUERIES)  # p00 stands in both objects


def test_chunks_of_objects_that_are_gone_leave_no_place_empty(chunked: Chunked) -> None:
    """An index that has more than the data set: what is gone counts as unknown, once a passage."""
    described, search_index = chunked.index("Flat")
    kept = dataclasses.replace(chunked.manifest, shards=chunked.manifest.shards[1:])
    source = dataclasses.replace(chunked.source, manifest=kept)
    how = dataclasses.replace(plan_retrieval(source, described, 10, 0), k=10)
    rest = RowHolder(STORAGE, source.root, ShardMap.of(kept))
    found = retrieve(QUERIES, search_index, how, rest)
    assert {name for rows in results(found) for name, _ in rows} <= set(chunked.names[1])
    assert {len(rows) for rows in results(found)} == {10}
    assert found.unknown > 0


def test_a_search_for_what_the_index_was_not_tuned_for_is_told_so(
    chunked: Chunked, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(shutil.copytree(chunked.source.root, tmp_path / "data"))
    (tmp_path / "q.jsonl").write_text('{"_id": "1", "text": "?"}\n')
    shards = tuple(sha256[:SHARD_DIGITS] for sha256 in chunked.source.shard_hashes)
    keys = {"output__uri": str(root), "search__output": str(tmp_path / "run")}

    def told(results: Any, group: str) -> bool:
        described = index_description(
            vector_fingerprint=chunked.source.spec.vector_fingerprint,
            dim=DIM,
            ntotal=len(chunked.ids),
            shards=shards,
            results=results,
        )
        (root / "index").mkdir(exist_ok=True)
        (root / "index" / "index.json").write_bytes(to_json(described))
        caplog.clear()
        with pytest.raises(ModelError):  # these data sets have their model only by name
            SearchJob(settings_for(**keys, search__queries=str(tmp_path / "q.jsonl"), search__group=group))
        return "was tuned for" in caplog.text

    assert [told("passages", "passage"), told("vectors", "chunk")] == [False, False]
    assert [told("vectors", "passage"), told("passages", "chunk")] == [True, True]


def test_what_is_no_index_is_not_held_twice(chunked: Chunked, tmp_path: Path) -> None:
    keys = {"output__uri": chunked.source.root, "search__output": str(tmp_path / "run")}
    with pytest.raises(SettingsError, match=r"search\.replicas 2: .* has no index to be held"):
        SearchJob(settings_for(**keys, search__queries=str(tmp_path / "q.jsonl"), search__replicas=2))


def test_open_index_answers_with_passages_and_their_chunks(chunked: Chunked) -> None:
    index = bge_ray.open_index(chunked.source.root)

    def pairs(found: list[list[Hit]]) -> list[list[tuple[str, int]]]:
        return [[(hit.passage_id, hit.vector_id) for hit in hits] for hits in found]

    hits = index.search(QUERIES, 7, columns=["n_tokens"])
    assert pairs(hits) == chunked.brute(7, "passage")
    assert pairs(index.search(QUERIES, 7, group="chunk")) == chunked.brute(7, "chunk")
    hit = hits[0][0]
    assert (hit.chunk_no, hit.start) == (hit.vector_id & 8191, CHUNK_CHARS * (hit.vector_id & 8191))
    assert hit.columns == {"n_tokens": 5}
