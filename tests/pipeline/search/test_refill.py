"""A search for k returns k passages where there are k, from an index of this data set; on a real Ray."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from bge_ray.dataset.lookup import ShardMap
from bge_ray.errors import DatasetMismatchError, ModelError
from bge_ray.index.refill import Ask, Reach
from bge_ray.index.topk import exact_topk
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.index.job import build_index
from bge_ray.pipeline.index.published import index_files
from bge_ray.pipeline.index.searchers import Searcher
from bge_ray.pipeline.runs.groups import GroupTask, GroupUnit, Workplace
from bge_ray.pipeline.runs.holders import RowHolder
from bge_ray.pipeline.search.exact import ShardSearcher
from bge_ray.pipeline.search.finders import Finder
from bge_ray.pipeline.search.job import SearchJob
from bge_ray.pipeline.search.retrieve import Retrieval
from bge_ray.pipeline.search.stages import RetrieveJob, retrieve_stage
from bge_ray.records.dataset import Manifest
from bge_ray.records.index import IndexDescription
from bge_ray.settings.sections import parse_settings
from bge_ray.storage.objects import Storage
from tests.support.searches import settings_for
from tests.support.vectors import VectorDataset, clustered, make_dataset

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

STORAGE = Storage(5)
DIM = 32
QUERIES = clustered(12, DIM, seed=99)
NAMES = [f"p{row}" for row in range(300)]


@pytest.fixture
def actors() -> Iterator[Callable[..., Any]]:
    """Starts actors that end with the test."""
    started = []

    def start(kind: type, *arguments: Any) -> Any:
        started.append(ray.remote(num_cpus=0)(kind).remote(*arguments))
        return started[-1]

    yield start
    for actor in started:
        ray.kill(actor)


def retrieved(
    root: str, manifest: Manifest, searcher: Any, index: IndexDescription | None, k: int, **changes: Any
) -> tuple[dict[int, list[tuple[str, float]]], dict[str, Any]]:
    """Passages and scores by the number of the query, and the facts of the parcel."""
    most = index.ntotal if index is not None else manifest.vectors
    effort = index.effort if index is not None else None
    first = Ask(changes.pop("fetched", min(k, most)), changes.pop("effort", effort))
    retrieval = Retrieval(
        k=min(k, manifest.vectors),
        group="passage",
        per_row=False,
        reach=Reach(first, most, index.largest_effort if index is not None else 1),
        rescores=changes.pop("rescores", False),
    )
    assert not changes
    job = RetrieveJob(
        Workplace(STORAGE, f"{root}/work", 3, None),
        (Finder("embedding", ((searcher,),), retrieval),),
        RowHolder(STORAGE, root, ShardMap.of(manifest)),
        spans=False,
    )
    rows = len(QUERIES)
    table = pa.table(
        {
            "row_no": np.arange(rows),
            "query_id": [f"q{i}" for i in range(rows)],
            "query": ["?"] * rows,
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(QUERIES.ravel()), DIM),
            "reason": pa.nulls(rows, pa.string()),
            "detail": pa.nulls(rows, pa.string()),
        }
    )
    task = GroupTask(0, "x", (GroupUnit(0, rows, "f"),))
    parcel = Parcel.from_batch(retrieve_stage(Parcel.of("0", task).filled(table).to_batch(), job))
    assert parcel.error is None
    found: dict[int, list[tuple[str, float]]] = {}
    for row in parcel.table.to_pylist():
        found.setdefault(row["row_no"], []).append((row["passage_id"], row["first_score"]))
    assert list(found) == sorted(found)
    return found, parcel.facts


def brute(vectors: np.ndarray, k: int) -> list[list[str]]:
    _, places = exact_topk(QUERIES, [(vectors, np.arange(len(vectors)))], k)
    return [[NAMES[place] for place in row] for row in places]


def copied(root: Path, times: int) -> tuple[VectorDataset, Manifest, np.ndarray]:
    """A data set of one corpus file that stands in it so many times."""
    vectors = clustered(len(NAMES), DIM, 1)
    made = VectorDataset(str(root), DIM)
    for number in range(times):
        made.put(number, vectors, NAMES)
    return made, made.publish(), vectors


@pytest.mark.slow
def test_passages_that_fall_together_leave_no_place_empty(tmp_path: Path, actors: Callable) -> None:
    _, manifest, vectors = copied(tmp_path, 5)
    root = str(tmp_path)
    exact = actors(ShardSearcher, STORAGE, root, ShardMap.of(manifest), 1)
    found, facts = retrieved(root, manifest, exact, None, 10)
    assert [[name for name, _ in rows] for rows in found.values()] == brute(vectors, 10)
    assert (facts["missing_results"], facts["refilled_queries"]) == (0, len(QUERIES))
    index = build_index(parse_settings(None, [f"output.uri={root}", "index.factory=IVF16,SQ8"]))
    searcher = actors(Searcher, STORAGE, index_files(root, index), 1)
    for effort in (1, index.nlist):  # one list has less than is asked for: more are probed then
        found, facts = retrieved(root, manifest, searcher, index, 60, effort=effort)
        assert {len(rows) for rows in found.values()} == {60}
        assert facts["missing_results"] == 0
    found, _ = retrieved(root, manifest, searcher, index, 10, effort=index.nlist, fetched=20, rescores=True)
    assert [[name for name, _ in rows] for rows in found.values()] == brute(vectors, 10)


@pytest.mark.slow
def test_k_beyond_the_data_set_gives_all_of_it_and_costs_no_more(tmp_path: Path, actors: Callable) -> None:
    _, manifest, _ = copied(tmp_path, 2)
    root = str(tmp_path)
    exact = actors(ShardSearcher, STORAGE, root, ShardMap.of(manifest), 1)
    scores, _ = ray.get(exact.search.remote(QUERIES, 100_000, None))
    assert scores.shape == (len(QUERIES), 600)
    found, _ = retrieved(root, manifest, exact, None, 100_000)
    assert {len(rows) for rows in found.values()} == {len(NAMES)}  # each passage once
    index = build_index(parse_settings(None, [f"output.uri={root}", "index.factory=IVF4,SQ8"]))
    searcher = actors(Searcher, STORAGE, index_files(root, index), 1)
    scores, _ = ray.get(searcher.search.remote(QUERIES, 100_000, 4))
    assert scores.shape == (len(QUERIES), 600)
    job = search_job(root, tmp_path, search__k=100_000, search__unit_queries=5000)
    assert job.limits().group_rows <= 2_000_000 // 600


def search_job(root: str, tmp_path: Path, **keys: Any) -> SearchJob:
    """A search that is planned as far as its model, which these data sets have only by name."""
    (tmp_path / "q.jsonl").write_text('{"_id": "1", "text": "?"}\n')
    job = object.__new__(SearchJob)
    asked = {"search__queries": str(tmp_path / "q.jsonl"), "search__output": str(tmp_path / "run")}
    with pytest.raises(ModelError):
        job.__init__(settings_for(output__uri=root, **asked, **keys))
    return job


@pytest.mark.slow
def test_an_index_that_lacks_passages_is_refused_and_one_that_has_too_many_is_searched(
    tmp_path: Path, actors: Callable
) -> None:
    """Two objects of 100 rows, indexed; one is replaced by 100 others: the counts are the same."""
    root = str(tmp_path / "data")
    made = make_dataset(root, [100, 100], DIM)
    settings = parse_settings(None, [f"output.uri={root}", "index.factory=Flat"])
    index = build_index(settings)
    made.remove(1)
    made.put(2, clustered(100, DIM, seed=2))
    made.publish()
    with pytest.raises(DatasetMismatchError, match=r"100 of its 200 vectors .* are not in its index"):
        search_job(root, tmp_path)
    search_job(root, tmp_path, search__stale_index=True)
    search_job(root, tmp_path, search__exact=True)
    made.remove(2)
    manifest = made.publish()
    search_job(root, tmp_path)  # all that is there is in the index
    searcher = actors(Searcher, STORAGE, index_files(root, index), 1)
    found, facts = retrieved(root, manifest, searcher, index, 10)
    assert {len(rows) for rows in found.values()} == {10}
    assert {name.partition("-")[0] for rows in found.values() for name, _ in rows} == {"0"}
    assert (facts["missing_results"], facts["unknown_ids"] > 0) == (0, True)
    made.put(2, clustered(100, DIM, seed=2))
    made.publish()
    build_index(settings)
    search_job(root, tmp_path)
