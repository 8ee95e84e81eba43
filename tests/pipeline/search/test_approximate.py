"""A search of weights by Seismic on a real Ray, against the exact one of the same queries."""

import secrets
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.engine.stopping import Stopped, StopRequest
from bge_ray.pipeline.search.job import search
from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.reports import SearchReport
from bge_ray.records.sparse import Pruning, SparseChoice
from tests.support.corpora import docstrings, mixed_objects
from tests.support.models import make_m3
from tests.support.s3 import S3Server
from tests.support.searches import STORAGE, by_query, jsonl, read_run, settings_for, upload

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(900),
]

PASSAGES, K, TARGET = 240, 8, 0.9
Scored = dict[str, list[tuple[str, float]]]


@pytest.fixture(scope="module")
def root(s3_server: S3Server, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of weights and counts, and queries beside it."""
    root = f"s3://out/approximate-{secrets.token_hex(4)}"
    made = docstrings(PASSAGES)
    upload(f"{root}/corpus", mixed_objects(made))
    asked = [{"_id": f"q{i}", "text": f"how to {p['title']} with {i}"} for i, p in enumerate(made[::8])]
    upload(root, {"queries.jsonl": jsonl(asked)})
    model = make_m3(tmp_path_factory.mktemp("models") / "tiny-m3", dim=64, pickled=True)
    keys = {"corpus__uri": f"{root}/corpus", "output__uri": f"{root}/data", "model__name": str(model)}
    embed(settings_for(**keys, model__outputs=["sparse", "bm25"], batching__unit_rows=60))
    return root


def keys_of(root: str, output: str, **asked: object) -> dict[str, Any]:
    keys = {"first_stage": "sparse", "k": K, "unit_queries": 5, "queries": f"{root}/queries.jsonl"}
    keys |= {"output": output, "num_searchers": 2} | asked
    return {"output__uri": f"{root}/data"} | {f"search__{name}": value for name, value in keys.items()}


def run(root: str, output: str, **asked: object) -> tuple[SearchReport, Scored]:
    report = search(settings_for(**keys_of(root, output, **asked)))
    return report, by_query(read_run(output))


@pytest.fixture(scope="module")
def exact(root: str) -> Scored:
    report, found = run(root, f"{root}/exact")
    assert report.sparse is None
    return found


def test_an_approximate_search_finds_what_was_asked_for(root: str, bucket: str, exact: Scored) -> None:
    report, found = run(root, f"{bucket}/run", sparse="approximate", sparse_recall=TARGET)
    choice = report.sparse
    assert choice is not None and choice.taken and choice.recall is not None
    assert (choice.target, choice.queries, choice.recall.k) == (TARGET, len(exact), K)
    assert report.way == "the weights of tokens, approximately"
    assert set(found) == set(exact)
    shares = []
    for name, pairs in found.items():
        truth = dict(exact[name])
        shares.append(len(truth.keys() & dict(pairs).keys()) / len(truth))
        assert len(pairs) == len(truth)
        assert all(truth.get(passage, score) == score for passage, score in pairs)  # bit for bit
    # All queries were the sample, so that what was measured is what was found.
    assert sum(shares) / len(shares) == pytest.approx(choice.recall.value) and choice.recall.value >= TARGET
    assert not STORAGE.list_files(f"{bucket}/run/work")
    asked = keys_of(root, f"{bucket}/run", sparse="approximate", sparse_recall=TARGET)
    assert search(settings_for(**asked)).outcome == "nothing to do"
    assert search(settings_for(**(asked | {"search__sparse_recall": 0.5}))).outcome != "nothing to do"


def test_where_the_target_is_missed_the_run_is_the_exact_one(
    root: str, bucket: str, exact: Scored, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bge_ray.index.seismic.LADDER", (Pruning(1, 1.0),))
    report, found = run(root, f"{bucket}/run", sparse="approximate", sparse_recall=1.0)
    assert found == exact
    assert report.sparse is not None and not report.sparse.taken
    assert report.way == "the weights of tokens"
    (line,) = report.advice
    assert "no approximation reached search.sparse_recall 1" in line and line in caplog.messages


def test_fused_with_counts_which_are_searched_exactly(root: str, bucket: str, exact: Scored) -> None:
    asked: dict[str, object] = {"first_stage": "hybrid", "candidates": 20}
    report, _ = run(root, f"{bucket}/run", sparse="approximate", **asked)
    assert report.way == "the weights of tokens, approximately; BM25; fused by rrf"
    assert report.sparse is not None and report.sparse.recall is not None and report.sparse.recall.k == 20
    run(root, f"{bucket}/exact", **asked)
    columns = ["query_id", "passage_id", "bm25_score"]
    tables = [
        pq.read_table(pa.BufferReader(STORAGE.read(f"{bucket}/{name}/run.parquet")), columns=columns)
        for name in ("run", "exact")
    ]
    ours, truth = ({tuple(row.values()) for row in table.to_pylist()} for table in tables)
    assert len(ours & truth) >= TARGET * len(truth)


class AfterAPart(StopRequest):
    """Stops a run as soon as a part of it is there."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    def check(self) -> None:
        if STORAGE.list_files(f"{self._folder}/work/parts"):
            self.note(15)
        super().check()


def test_a_run_that_was_stopped_goes_on_as_it_began(root: str, bucket: str) -> None:
    """What it settled is noted, and neither measured nor decided anew."""
    output = f"{bucket}/run"
    settings = settings_for(**keys_of(root, output, sparse="approximate"))
    with pytest.raises(Stopped):
        search(settings, AfterAPart(output))
    (noted,) = STORAGE.list_files(f"{output}/work/sparse")
    choice = from_json(SparseChoice, STORAGE.read(noted.uri))
    marked = SparseChoice(**(vars(choice) | {"build_s": 12345.0}))
    STORAGE.write(noted.uri, to_json(marked))
    report = search(settings)
    assert report.sparse == marked
    assert report.queries_out == report.queries_in
    assert not STORAGE.list_files(f"{output}/work")
