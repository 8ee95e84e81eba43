"""Searches among what passes a filter, without Ray: against numpy over the rows that pass."""

import copy
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest

import bge_ray
from bge_ray.dataset.filters import FilterReader
from bge_ray.dataset.lookup import ShardMap
from bge_ray.dataset.passing import Passing, mark_all
from bge_ray.errors import ModelError, SettingsError
from bge_ray.index.factory import Metric, check_factory
from bge_ray.pipeline.runs.intake import Rejections
from bge_ray.pipeline.runs.source import Source
from bge_ray.pipeline.search import filtering
from bge_ray.pipeline.search.filtering import Filtering
from bge_ray.pipeline.search.job import SearchJob
from bge_ray.records.canonical import to_json
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import vector_ids
from bge_ray.records.index import SHARD_DIGITS
from bge_ray.retrieval import Hit
from bge_ray.settings.sections import parse_settings
from bge_ray.storage.objects import Storage
from tests.report.samples import index_description
from tests.support.searches import settings_for
from tests.support.slow import slow_but
from tests.support.vectors import CHUNKING, VectorDataset, clustered

pytestmark = pytest.mark.long

STORAGE = Storage(5)
DIM = 32
QUERIES = clustered(10, DIM, seed=99)
KEPT = {"year": pa.int32(), "lang": pa.string(), "day": pa.string()}
# By the share of rows that pass.
FILTERS = {
    "true": lambda row: True,
    "year < 2023": lambda row: row["year"] is not None and row["year"] < 2023,
    "lang = 'de'": lambda row: row["lang"] == "de",
    "lang = 'de' AND year = 2003": lambda row: row["lang"] == "de" and row["year"] == 2003,
    "day = '2026-01-01'": lambda row: row["day"] == "2026-01-01",
    "year = 2003 AND lang IS NULL": lambda row: row["year"] == 2003 and row["lang"] is None,
    "year > 3000": lambda row: False,
}


class Filed:
    """Passages with a year, a language and a day, of one or several chunks, in two objects."""

    def __init__(self, root: Path, *, chunks: bool) -> None:
        rng = np.random.default_rng(5)
        made = VectorDataset(str(root), DIM, chunking=CHUNKING if chunks else None, kept=KEPT)
        self.rows: list[dict[str, Any]] = []
        vectors = []
        for number, day in enumerate(("2026-01-01", "2026-01-02")):
            sizes = rng.integers(1, 6, 400).tolist() if chunks else [1] * 700
            kept = {
                "year": [None if rng.random() < 0.05 else int(rng.integers(2000, 2026)) for _ in sizes],
                "lang": [[None, "de", "en", "fr"][rng.integers(0, 4)] for _ in sizes],
                "day": [day] * len(sizes),
            }
            names = [f"p{number}-{row:03d}" for row in range(len(sizes))]
            some = clustered(sum(sizes), DIM, seed=number)
            arrays = {name: pa.array(values, KEPT[name]) for name, values in kept.items()}
            made.put(number, some, names, sizes, kept=arrays)
            vectors.append(some)
            for row, size in enumerate(sizes):
                told = {name: values[row] for name, values in kept.items()} | {"passage_id": names[row]}
                ids = vector_ids(number, np.full(size, row), np.arange(size)).tolist()
                self.rows += [told | {"vector_id": vector_id} for vector_id in ids]
        self.vectors = np.concatenate(vectors)
        self.ids = np.array([row["vector_id"] for row in self.rows])
        self.manifest = made.publish()
        self.source = Source(STORAGE, str(root), made.spec, self.manifest)
        self.root = str(root)

    def brute(self, text: str, k: int, group: str) -> list[list[tuple[str, int]]]:
        """(passage id, vector id) of the k best of what passes, ties by passage id."""
        places = np.array([i for i, row in enumerate(self.rows) if FILTERS[text](row)], np.int64)
        names = np.array([self.rows[i]["passage_id"] for i in places], str)
        matrix = self.vectors[places].astype(np.float64)
        matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
        found = []
        for query in QUERIES:
            scores = (matrix * query.astype(np.float64)).sum(axis=1).astype(np.float32)
            best: dict[Any, int] = {}
            for i in np.lexsort((self.ids[places], names, -scores)).tolist():
                best.setdefault(names[i] if group == "passage" else i, i)
            found.append([(str(names[i]), int(self.ids[places[i]])) for i in list(best.values())[:k]])
        return found

    def index(self, factory: str, effort: int) -> None:
        """Write what the index job publishes, made by plain FAISS."""
        spec = check_factory(factory, DIM, Metric.L2)
        made = faiss.index_factory(DIM, spec.factory, Metric.L2.faiss)
        made.train(self.vectors)
        made.add_with_ids(self.vectors, self.ids)
        data = faiss.serialize_index(made).tobytes()
        folder = Path(self.root, "index")
        folder.mkdir(exist_ok=True)
        (folder / "index.faiss").write_bytes(data)
        parameter = "nprobe" if "IVF" in factory else "efSearch" if "HNSW" in factory else None
        described = index_description(
            factory=spec.factory,
            vector_fingerprint=self.source.spec.vector_fingerprint,
            dim=DIM,
            ntotal=len(self.rows),
            nlist=spec.nlist,
            parameter=parameter,
            effort=effort,
            files=(FileFact("index.faiss", len(data), hashlib.sha256(data).hexdigest(), len(self.rows)),),
            shards=tuple(sha256[:SHARD_DIGITS] for sha256 in self.source.shard_hashes),
        )
        (folder / "index.json").write_bytes(to_json(described))


def pairs(found: list[list[Hit]]) -> list[list[tuple[str, int]]]:
    return [[(hit.passage_id, hit.vector_id) for hit in hits] for hits in found]


def share_of(ours: list[list[Any]], truth: list[list[Any]]) -> float:
    hits = sum(len(set(a) & set(b)) for a, b in zip(ours, truth, strict=True))
    return hits / sum(map(len, truth)) if any(truth) else 1.0


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "chunks"])
def filed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Filed:
    return Filed(tmp_path_factory.mktemp("filed") / "data", chunks=request.param)


@pytest.mark.parametrize("group", ["passage", "chunk"])
@pytest.mark.parametrize("k", slow_but([10], [1, 10, 100]))
def test_an_exact_search_finds_the_best_of_what_passes(
    filed: Filed, k: int, group: Any, tmp_path: Path
) -> None:
    """Fewer than k where fewer pass, and none where none does."""
    index = bge_ray.open_index(filed.root)
    for text in FILTERS:
        found = index.search(QUERIES, k, filter=text, group=group, columns=["year", "lang"])
        assert pairs(found) == filed.brute(text, k, group)
        assert all(FILTERS[text](hit.columns | {"day": text[7:17]}) for hits in found for hit in hits)


@pytest.mark.parametrize(
    ("factory", "effort"),
    slow_but(
        [("IVF16,Flat", 4), ("HNSW16,SQ8", 60)],
        [("Flat", 1), ("IVF16,Flat", 4), ("IVF16,SQ8", 4), ("HNSW16", 60), ("HNSW16,SQ8", 60)],
    ),
)
def test_an_index_finds_the_best_of_what_passes(
    filed: Filed, tmp_path: Path, factory: str, effort: int
) -> None:
    copied = copied_to(filed, tmp_path)
    copied.index(factory, effort)
    index = bge_ray.open_index(copied.root)
    for k, group in ((10, "passage"), (100, "passage"), (10, "chunk")):
        without = share_of(pairs(index.search(QUERIES, k, group=group)), filed.brute("true", k, group))
        for text in FILTERS:
            truth = filed.brute(text, k, group)
            found = pairs(index.search(QUERIES, k, filter=text, group=group))
            assert [len(hits) for hits in found] == [len(hits) for hits in truth]
            assert share_of(found, truth) >= min(without, 0.98) - 0.02
    # Where little passes all of it is compared, and by the stored vectors in the end.
    for text in ("lang = 'de' AND year = 2003", "year > 3000"):
        assert pairs(index.search(QUERIES, 10, filter=text)) == filed.brute(text, 10, "passage")


def copied_to(filed: Filed, tmp_path: Path) -> Filed:
    """The same data set at another place, where an index may be put."""
    copied = copy.copy(filed)
    copied.root = str(shutil.copytree(filed.root, tmp_path / "data"))
    return copied


def test_a_shard_of_which_nothing_passes_is_not_read(filed: Filed, tmp_path: Path) -> None:
    """All rows of the second object are of another day: its vectors are gone here, and nobody misses them."""
    copied = copied_to(filed, tmp_path)
    index = bge_ray.open_index(copied.root)
    text = "day = '2026-01-01'"
    settled = index._settled(text)
    assert index._passing[settled].passes.rows == sum(
        row["day"] == "2026-01-01" and not row["vector_id"] & 8191 for row in filed.rows
    )
    Path(copied.root, ShardMap.of(filed.manifest).facts[1].path).unlink()
    assert pairs(index.search(QUERIES, 10, filter=text)) == filed.brute(text, 10, "passage")


def test_what_was_settled_is_kept_and_bounded(filed: Filed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bge_ray.retrieval.KEPT_MARKS_BYTES", 300)
    index = bge_ray.open_index(filed.root)
    for year in range(2000, 2008):
        index.search(QUERIES, 3, filter=f"year > {year}")
    assert 1 <= len(index._passing) < 8
    again = index.search(QUERIES, 10, filter="year<2023")
    assert pairs(again) == filed.brute("year < 2023", 10, "passage")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "yeer = 1",
            r"filter 'yeer = 1': column 'yeer' at character 1: .* keeps none of that name, only day",
        ),
        ("year = ", "filter 'year = ': syntax error"),
        ("year", "filter 'year': is of type INTEGER"),
        ("lang::INTEGER = 1", r"Could not convert string 'd?e?n?f?r?' .*\(in .*embeddings/"),
    ],
)
def test_open_index_refuses_what_is_no_filter(filed: Filed, text: str, why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        bge_ray.open_index(filed.root).search(QUERIES, 3, filter=text)


def test_the_job_refuses_before_anything_is_written(filed: Filed, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"_id": "1", "text": "?"}\n')
    keys = {"search__queries": str(tmp_path / "q.jsonl"), "search__output": str(tmp_path / "run")}
    plain = VectorDataset(str(tmp_path / "plain"))
    plain.put(0, clustered(5, 32, seed=1))
    plain.publish()
    cases = [
        (
            filed.root,
            {"search__filter": "yeer = 1"},
            "search.filter 'yeer = 1': column 'yeer' at character 1",
        ),
        (filed.root, {"search__filter": "year >"}, "search.filter 'year >': syntax error"),
        (filed.root, {"search__filter": "lang || 'x'"}, "is of type VARCHAR"),
        (
            plain.dataset.root,
            {"search__filter": "true"},
            "search.filter 'true': output.uri .* keeps no columns",
        ),
        (
            plain.dataset.root,
            {"search__filter_column": "only"},
            "search.filter_column: output.uri .* keeps no",
        ),
    ]
    for root, asked, why in cases:
        with pytest.raises(SettingsError, match=why):
            SearchJob(settings_for(output__uri=root, **keys, **asked))
    with pytest.raises(ModelError):  # as far as the model, which these data sets have only by name
        SearchJob(settings_for(output__uri=filed.root, **keys, search__filter="year > 2000"))
    assert not (tmp_path / "run").exists()


def job_without_model(filed: Filed, tmp_path: Path, **keys: Any) -> SearchJob:
    job = object.__new__(SearchJob)
    with pytest.raises(ModelError):
        job.__init__(settings_for(output__uri=filed.root, search__output=str(tmp_path / "run"), **keys))
    return job


def test_each_query_has_its_filter_and_a_bad_one_is_one_rejected_query(filed: Filed, tmp_path: Path) -> None:
    lines = [
        {"_id": "own", "text": "?", "only": "lang = 'de'"},
        {"_id": "same", "text": "?", "only": " lang='de' "},
        {"_id": "null", "text": "?", "only": None},
        {"_id": "blank", "text": "?", "only": "  "},
        {"_id": "none", "text": "?"},
        {"_id": "column", "text": "?", "only": "yeer = 3"},
        {"_id": "number", "text": "?", "only": 7},
        {"_id": "syntax", "text": "?", "only": "year ="},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = {"search__queries": str(tmp_path / "q.jsonl"), "search__filter_column": "only"}
    for common, told in ((None, [None] * 3), ("year > 2010", ['("year" > 2010)'] * 3)):
        job = job_without_model(filed, tmp_path, **keys, search__filter=common)
        rejections = Rejections()
        blocks = list(job.blocks(rejections, lambda: None))
        assert [block["query_id"][0] for block in blocks] == ["own", "same", "null", "blank", "none"]
        filters = [block["filter"][0] for block in blocks]
        assert filters[0] == filters[1] and "lang = 'de'" in filters[0]
        assert filters[2:] == told
        assert rejections.query_ids == ["column", "number", "syntax"]
        assert rejections.reasons == ["bad_filter"] * 3
        assert "column 'yeer' at character 1" in rejections.details[0]
        assert "is of type INTEGER" in rejections.details[1]
        assert "7: " in rejections.details[1]
    assert '"year" > 2010' in filters[0]


def test_more_filters_than_memory_is_for_are_refused(filed: Filed, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(filtering, "MARKS_BYTES", filed.manifest.rows_in)  # for eight of them
    asked = parse_settings(None, ["search.filter_column=only"]).search
    noted = Filtering(asked, filed.source)
    for year in range(8):
        noted.note(noted.read(f"year > {year}"))
        noted.note(noted.read(f"year>{year}"))
    with pytest.raises(
        SettingsError, match=r"more than 8 different filters.* split the queries by their filters"
    ):
        noted.note(noted.read("year > 8"))


def test_a_question_at_a_terminal_has_a_filter(filed: Filed) -> None:
    """What is wrong with it is said before a model is looked for, which these data sets have only by name."""
    words = [sys.executable, "-m", "bge_ray", "ask", filed.root, "--filter", "yeer = 1", "a question"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "filter 'yeer = 1': column 'yeer' at character 1" in ended.stderr


def test_queries_of_one_filter_are_asked_together_and_no_queries_as_none() -> None:
    table = pa.table({"filter": pa.array(["b", None, "a", "b"], pa.string())})
    found = [(sql, numbers.tolist()) for sql, numbers in filtering.by_filter(table)]
    assert found == [("b", [0, 3]), (None, [1]), ("a", [2])]
    for empty in (table.slice(0, 0), pa.table({"query": pa.array([], pa.string())})):
        assert [(sql, len(numbers)) for sql, numbers in filtering.by_filter(empty)] == [(None, 0)]


def test_settled_once_for_all_who_ask(filed: Filed) -> None:
    reader = FilterReader(filed.source.spec, filed.root)
    filters = [reader.read(text) for text in FILTERS]
    settled = mark_all(STORAGE, filed.root, ShardMap.of(filed.manifest), filters)
    for text, one in zip(FILTERS, filters, strict=True):
        passing = settled[one.sql]
        assert isinstance(passing, Passing)
        assert passing.has(filed.ids).tolist() == [FILTERS[text](row) for row in filed.rows]
