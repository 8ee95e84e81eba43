"""Candidates of several outputs, fused and scored again: against brute force and FlagEmbedding; no Ray."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bge_ray.dataset.lookup import ShardMap
from bge_ray.errors import StorageError
from bge_ray.index.fusion import Fusion, fuse
from bge_ray.index.scores import colbert_scores, dense_scores, sparse_scores
from bge_ray.index.topk import Results, merge_topk
from bge_ray.model.spec import text_feeder
from bge_ray.pipeline.runs.holders import Handover, RowHolder
from bge_ray.pipeline.runs.source import Source
from bge_ray.pipeline.search.combine import Combining, Ranking, Rescoring, combine
from bge_ray.pipeline.search.exact import ShardSearcher
from bge_ray.pipeline.search.lists import ListSearcher
from bge_ray.pipeline.search.retrieve import Found, Group, plan_retrieval, retrieve, told_columns
from bge_ray.records.arrays import SparseRows, dense_rows, multi_rows, sparse_rows
from bge_ray.records.model import ModelSpec
from bge_ray.storage.objects import Storage
from tests.model.conftest import load, resolve, run
from tests.support.corpora import docstrings
from tests.support.counted import CountedStorage
from tests.support.models import SENTENCES, make_m3
from tests.support.vectors import CHUNKING, VectorDataset

STORAGE = Storage(5)
THREE = ("embedding", "sparse", "colbert")
WEIGHTS = (0.4, 0.2, 0.4)
QUERIES = ["how to read a file", *SENTENCES[:3], "the module of the tests"]


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of so many dimensions that what half precision rounds off evens out, as it does in bge-m3.

    FlagEmbedding makes random heads where these are no pickled files.
    """
    return make_m3(tmp_path_factory.mktemp("m3") / "model", dim=256, pickled=True)


@pytest.fixture(scope="module")
def spec(m3: Path) -> ModelSpec:
    return resolve(m3, outputs=(*THREE, "bm25"))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [f"{p['title']} {p['text']}" for p in docstrings(600)[:60]] + SENTENCES


class Embedded:
    """Texts as three shards of a data set; with chunks, three texts to a passage."""

    def __init__(self, root: Path, spec: ModelSpec, texts: list[str], *, chunks: bool) -> None:
        columns = run(load(spec), text_feeder(spec).passages(texts)).columns()
        facts = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
        made = VectorDataset(str(root), chunking=CHUNKING if chunks else None, **facts)
        step = -(-len(texts) // 9) * 3
        self.names: list[str] = []
        for number, start in enumerate(range(0, len(texts), step)):
            some = {name: values.slice(start, step) for name, values in columns.items()}
            n = len(some["bm25"])
            sizes = [min(3, n - at) for at in range(0, n, 3)] if chunks else [1] * n
            names = [f"p{number}-{row}" for row in range(len(sizes))]
            made.put(number, some, names, sizes)
            self.names += [name for name, size in zip(names, sizes, strict=True) for _ in range(size)]
        self.source = Source(STORAGE, str(root), made.spec, made.publish())
        self.stored = RowHolder(STORAGE, str(root), ShardMap.of(self.source.manifest))
        self.table = pa.table(columns)
        asked = dataclasses.replace(spec, passage_instruction="").only(*THREE).stored_as("float32")
        self.queries = pa.table(run(load(asked), text_feeder(asked).queries(QUERIES)).columns())

    def find(self, output: str, k: int, group: Group) -> Found:
        how = plan_retrieval(self.source, None, k, 0, group=group)
        shards, root = ShardMap.of(self.source.manifest), self.source.root
        if output == "embedding":
            searcher = ShardSearcher(STORAGE, root, shards, 1, per_row=how.per_row)
            return retrieve(dense_rows(self.queries["embedding"]), searcher.search, how, self.stored)
        count = len(shards.facts)
        each = [shards.every(count, number) for number in range(count)]
        lists = [ListSearcher(STORAGE, root, one, output, per_row=how.per_row) for one in each]

        def search(queries: SparseRows, fetched: int, effort: int | None) -> Results:
            return merge_topk([one.search(queries, fetched, None) for one in lists], fetched)

        return retrieve(sparse_rows(self.queries[output]), search, how, self.stored)

    def brute(self, output: str) -> np.ndarray:
        """(queries, chunks) scores of what is stored."""
        column = self.table[output]
        rows = [self.queries.slice(number, 1)[output] for number in range(len(QUERIES))]
        if output == "embedding":
            return np.stack([dense_scores(dense_rows(row)[0], dense_rows(column)) for row in rows])
        if output == "sparse":
            return np.stack([sparse_scores(sparse_rows(row), sparse_rows(column)) for row in rows])
        stored = multi_rows(column, "float16")
        return np.stack([colbert_scores(multi_rows(row, "float32").vectors, stored) for row in rows])


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "chunks"])
def data(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    spec: ModelSpec,
    texts: list[str],
) -> Embedded:
    return Embedded(tmp_path_factory.mktemp("data"), spec, texts, chunks=request.param)


def combined(data: Embedded, found_by: tuple[str, ...], how: Combining, depth: int, group: Group) -> Ranking:
    found = [data.find(output, depth, group) for output in found_by]
    return combine(found, data.queries, data.stored, how, by_passage=group == "passage")


def best_of(scores: np.ndarray, names: list[str], k: int) -> list[tuple[str, float]]:
    best: dict[str, float] = {}
    for name, score in zip(names, scores.tolist(), strict=True):
        best[name] = max(best.get(name, -np.inf), score)
    return sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))[:k]


def of_query(ranking: Ranking, number: int) -> list[tuple[str, float]]:
    names = ranking.rows["passage_id"].to_pylist()
    return [(names[i], float(ranking.scores[i])) for i in np.flatnonzero(ranking.numbers == number)]


def test_what_searchers_read_is_not_read_again_to_score_it(data: Embedded) -> None:
    storage, root, shards = CountedStorage(), data.source.root, ShardMap.of(data.source.manifest)
    stored = RowHolder(storage, root, shards)
    handover = Handover(stored, (*told_columns(data.source), "embedding", "sparse"))
    exact = ShardSearcher(STORAGE, root, shards, 1, handover=handover)
    _, ids = exact.search(dense_rows(data.queries["embedding"]), 9, None)
    lists = ListSearcher(STORAGE, root, shards, "sparse", handover=handover)
    lists.search(sparse_rows(data.queries["sparse"]), 9, None)
    numbers, found = np.repeat(np.arange(len(ids)), 9), ids.ravel()
    outputs = [output for output in data.source.spec.model.outputs if output.name in ("embedding", "sparse")]
    assert not storage.bytes
    scores = stored.output_scores(outputs, data.queries, numbers, found)
    told = stored.places(np.unique(found), told_columns(data.source)[1:])
    # Of each shard its end, which says where columns lie, and no column.
    assert sorted(uri for uri, _, _ in storage.ranges) == sorted(
        f"{root}/{fact.path}" for fact in shards.facts
    )
    alone = RowHolder(STORAGE, root, shards)
    assert told.equals(alone.places(np.unique(found), told_columns(data.source)[1:]))
    for name, values in alone.output_scores(outputs, data.queries, numbers, found).items():
        np.testing.assert_array_equal(scores[name], values)


def test_the_lists_of_stored_weights_are_brute_force(data: Embedded) -> None:
    found = data.find("sparse", 7, "passage")
    for number, scores in enumerate(data.brute("sparse")):
        truth = [pair for pair in best_of(scores, data.names, 7) if pair[1] > 0]
        mine = found.numbers == number
        np.testing.assert_allclose(found.scores[mine], [score for _, score in truth], rtol=1e-5)
        names = found.rows.filter(pa.array(mine))["passage_id"].to_pylist()
        assert len(set(names)) == len(names) == len(truth)


@pytest.mark.parametrize("group", ["passage", "chunk"])
def test_scored_again_by_all_that_is_stored_is_the_best_of_all(data: Embedded, group: Group) -> None:
    """With candidates enough for all that there is, the order is that of brute force over everything."""
    spec = data.source.spec.model
    rescoring = Rescoring(tuple(spec.output(name) for name in THREE), WEIGHTS)
    how = Combining(("embedding",), 9, None, rescoring)
    ranking = combined(data, ("embedding",), how, 1000, "chunk" if data.source.chunked else group)
    if group == "passage":
        found = [data.find("embedding", 1000, "chunk")]
        ranking = combine(found, data.queries, data.stored, how, by_passage=True)
    scores = sum(w * data.brute(name) for w, name in zip(WEIGHTS, THREE, strict=True))
    names = data.names if group == "passage" else [f"{i:03d}" for i in range(len(data.names))]
    for number in range(len(QUERIES)):
        mine, truth = of_query(ranking, number), best_of(scores[number], names, 9)
        np.testing.assert_allclose([s for _, s in mine], [s for _, s in truth], atol=1e-5)
    for name in THREE:
        assert ranking.rows[f"{name}_score"].null_count == 0


def test_passages_that_two_lists_found_by_different_chunks_add_up(data: Embedded) -> None:
    how = Combining(("embedding", "sparse"), 10, Fusion("rrf", (1.0, 2.0), 60), None)
    ranking = combined(data, ("embedding", "sparse"), how, 8, "passage")
    lists = [data.find(output, 8, "passage") for output in ("embedding", "sparse")]
    for number in range(len(QUERIES)):
        truth: dict[str, float] = {}
        for weight, found in zip((1, 2), lists, strict=True):
            names = found.rows.filter(pa.array(found.numbers == number))["passage_id"].to_pylist()
            for rank, name in enumerate(names, 1):
                truth[name] = truth.get(name, 0.0) + weight / (60 + rank)
        best = sorted(truth.items(), key=lambda pair: (-pair[1], pair[0]))[:10]
        assert of_query(ranking, number) == [(name, pytest.approx(score)) for name, score in best]
    rows = ranking.rows
    only_one = np.isnan(rows["sparse_score"].to_numpy()) | np.isnan(rows["embedding_score"].to_numpy())
    assert rows["sparse_score"].null_count and not only_one.all()


@pytest.mark.parity
def test_scores_are_those_of_flagembedding(
    tmp_path: Path, m3: Path, spec: ModelSpec, texts: list[str]
) -> None:
    from FlagEmbedding import BGEM3FlagModel

    data = Embedded(tmp_path, spec, texts, chunks=False)
    rescoring = Rescoring(tuple(spec.output(name) for name in THREE), WEIGHTS)
    how = Combining(("embedding", "sparse"), 6, Fusion("minmax", (1.0, 1.0), 60), rescoring)
    ranking = combined(data, ("embedding", "sparse"), how, 10, "passage")
    flag = BGEM3FlagModel(str(m3), use_fp16=False, devices="cpu")
    by_name = dict(zip(data.names, texts, strict=True))
    for number, query in enumerate(QUERIES[:3]):
        mine = of_query(ranking, number)
        # One pair a batch: FlagEmbedding's ColBERT score depends on the padding of the others.
        theirs = flag.compute_score(
            [(query, by_name[name]) for name, _ in mine],
            batch_size=1,
            max_query_length=spec.max_length,
            max_passage_length=spec.max_length,
            weights_for_different_modes=list(WEIGHTS),
        )
        rows = ranking.rows.filter(pa.array(ranking.numbers == number))
        np.testing.assert_allclose([s for _, s in mine], theirs["colbert+sparse+dense"], atol=1e-4, rtol=0)
        for column, key in (("embedding", "dense"), ("sparse", "sparse"), ("colbert", "colbert")):
            np.testing.assert_allclose(rows[f"{column}_score"].to_numpy(), theirs[key], atol=1e-4, rtol=0)


def test_nothing_found_is_no_result_and_a_vector_that_is_gone_is_an_error(data: Embedded) -> None:
    how = Combining(("sparse",), 5, None, Rescoring((data.source.spec.model.output("colbert"),), (1.0,)))
    found = data.find("sparse", 5, "passage")
    none = found.numbers < 0
    empty = dataclasses.replace(
        found,
        numbers=found.numbers[none],
        scores=found.scores[none],
        rows=found.rows.filter(pa.array(none)),
    )
    assert len(combine([empty], data.queries, data.stored, how, by_passage=True).numbers) == 0
    outputs = (data.source.spec.model.output("colbert"),)
    with pytest.raises(StorageError, match="lacks"):
        data.stored.output_scores(outputs, data.queries, np.array([0, 0]), np.array([0, 1 << 12]))


def test_fusing_by_scores_takes_a_list_of_equals_for_the_best() -> None:
    numbers = np.array([0, 0, 0, 2, 2, 3])
    scores = np.array([5.0, 4.0, 1.0, 7.0, 7.0, 2.0], np.float32)
    [gains] = fuse([(numbers, scores)], Fusion("minmax", (2.0,), 60))
    np.testing.assert_allclose(gains, [1.0, 0.75, 0.0, 1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="longer"):
        fuse([(numbers, scores)], Fusion("rrf", (1.0, 1.0), 60))
