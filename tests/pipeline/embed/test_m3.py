"""The three outputs of an m3 through the whole job: what is stored, who can read it, what goes on from it."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from bge_ray.errors import DatasetMismatchError, ModelError, SettingsError
from bge_ray.model.spec import text_feeder
from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.index.job import build_index
from bge_ray.pipeline.search.job import search
from bge_ray.records.arrays import dense_rows, multi_rows, sparse_rows
from bge_ray.storage.objects import join
from tests.model.conftest import load, resolve, run
from tests.support.corpora import docstrings, jsonl_bytes
from tests.support.datasets import check_nothing_left_over, read_manifest, read_shards
from tests.support.models import SENTENCES, make_m3
from tests.support.runs import JobProcess, wait_until
from tests.support.searches import STORAGE, by_query, read_run, settings_for, upload

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

OUTPUTS = ["embedding", "sparse", "colbert"]
DIM, COLBERT_DIM = 32, 24


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_m3(
        tmp_path_factory.mktemp("models") / "tiny-m3", colbert_dim=COLBERT_DIM, positions=512, pickled=True
    )


@pytest.fixture(scope="module")
def records() -> list[dict[str, str]]:
    made = docstrings(600)[:90]
    return [*made, *({"id": f"s{i}", "title": "", "text": text} for i, text in enumerate(SENTENCES))]


def keys_for(root: str, model: Path, **more: object) -> dict[str, object]:
    keys: dict[str, object] = {"corpus__uri": f"{root}/corpus", "output__uri": f"{root}/out"}
    return keys | {"model__name": str(model), "model__outputs": OUTPUTS, "output__grace_s": 0} | more


def check_readers(root: str, folder: Path, table: pa.Table) -> None:
    """Every reader of the documentation gives the numbers that pyarrow gives."""
    import datasets

    for marker in read_manifest(root).shards:
        assert marker.embeddings is not None
        target = folder / marker.embeddings.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(STORAGE.read(join(root, marker.embeddings.path)))
    (folder / "README.md").write_bytes(STORAGE.read(join(root, "README.md")))
    sparse, vectors = table["sparse"].to_pylist(), table["colbert"].to_pylist()
    files = str(folder / "embeddings" / "*.parquet")

    rows = duckdb.sql(f"select sparse, colbert, embedding from '{files}' order by vector_id").fetchall()
    assert [row[0] for row in rows] == sparse and [row[1] for row in rows] == vectors
    assert [list(row[2]) for row in rows] == table["embedding"].to_pylist()

    frame = pl.scan_parquet(files).sort("vector_id").collect()
    assert frame["sparse"].to_list() == sparse and frame["colbert"].to_list() == vectors

    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(folder / "cache"))
    by_id = {row["passage_id"]: row for row in loaded}
    for name, weights, row in zip(table["passage_id"].to_pylist(), sparse, vectors, strict=True):
        assert by_id[name]["sparse"] == weights and by_id[name]["colbert"] == row


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_three_columns_are_those_of_the_model_and_index_and_search_go_on(
    bucket: str, m3: Path, records: list[dict[str, str]], tmp_path: Path
) -> None:
    upload(
        f"{bucket}/corpus",
        {
            "a.jsonl": jsonl_bytes(records[:70]),
            "b.jsonl": jsonl_bytes([*records[70:90], {"id": "bad", "text": ""}, *records[90:]]),
        },
    )
    result = embed(
        settings_for(**keys_for(bucket, m3, batching__unit_rows=30, corpus__max_rejected_fraction=0.02))
    )
    assert read_shards(f"{bucket}/out", "rejected")["passage_id"].to_pylist() == ["bad"]
    table = read_shards(f"{bucket}/out")
    assert table["passage_id"].to_pylist() == [r["id"] for r in records]
    check_nothing_left_over(f"{bucket}/out")

    spec = resolve(m3, outputs=OUTPUTS)
    model = load(spec)
    texts = [f"{r['title']} {r['text']}".strip() for r in records]
    truth = run(model, text_feeder(spec).passages(texts)).columns()
    np.testing.assert_allclose(dense_rows(table["embedding"]), dense_rows(truth["embedding"]), atol=1e-5)
    ours, theirs = sparse_rows(table["sparse"]), sparse_rows(truth["sparse"])
    np.testing.assert_array_equal(ours.offsets, theirs.offsets)
    np.testing.assert_array_equal(ours.indices, theirs.indices)
    np.testing.assert_allclose(ours.values, theirs.values, atol=2e-3)
    mine, other = multi_rows(table["colbert"], "float16"), multi_rows(truth["colbert"], "float16")
    np.testing.assert_array_equal(np.diff(mine.offsets), table["n_tokens"].to_numpy() - 1)
    np.testing.assert_allclose(mine.vectors, other.vectors, atol=1e-3)

    bytes_a_row = result.report.output_bytes
    # Beside the values: offsets of lists, and a bit a row where a unit has rejected rows.
    assert bytes_a_row["embedding"] == pytest.approx(4 * DIM, abs=1)
    assert bytes_a_row["colbert"] == pytest.approx(
        2 * COLBERT_DIM * len(mine.vectors) / len(table) + 4, abs=1
    )
    assert bytes_a_row["sparse"] == pytest.approx(6 * len(ours.values) / len(table) + 8, abs=1)
    assert "one vector a token, float16" in STORAGE.read(f"{bucket}/out/report.html").decode()
    described = json.loads(STORAGE.read(f"{bucket}/out/dataset.json"))
    assert [(o["name"], o["kind"], o["dim"]) for o in described["model"]["outputs"]] == [
        ("embedding", "dense", DIM),
        ("sparse", "sparse", json.loads((m3 / "config.json").read_text())["vocab_size"]),
        ("colbert", "multi", COLBERT_DIM),
    ]
    assert {c["output"] for c in described["canaries"]} == set(OUTPUTS)
    check_readers(f"{bucket}/out", tmp_path / "copy", table)

    with pytest.raises(DatasetMismatchError, match=r"model\.outputs: there .*colbert"):
        embed(settings_for(**keys_for(bucket, m3, model__outputs=["embedding", "sparse"])))

    build_index(settings_for(output__uri=f"{bucket}/out", index__factory="Flat"))
    upload(
        bucket,
        {"queries.jsonl": jsonl_bytes([{"_id": str(i), "text": text} for i, text in enumerate(texts[:5])])},
    )
    search(
        settings_for(
            output__uri=f"{bucket}/out",
            search__queries=f"{bucket}/queries.jsonl",
            search__output=f"{bucket}/run",
            search__k=3,
        )
    )
    best = [pairs[0][0] for pairs in by_query(read_run(f"{bucket}/run")).values()]
    assert best == [r["id"] for r in records[:5]]  # a passage that is asked for finds itself


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_without_dense_vectors_there_is_no_index_and_no_search(
    bucket: str, m3: Path, records: list[dict[str, str]], tiny_model: Path
) -> None:
    upload(f"{bucket}/corpus", {"a.jsonl": jsonl_bytes(records[:12])})
    keys = keys_for(bucket, m3, model__outputs=["sparse"])
    refused = r"no output embedding, only sparse.*model\.outputs"
    with pytest.raises(SettingsError, match=refused):
        embed(settings_for(**keys, index__build=True))
    with pytest.raises(ModelError, match=r"model\.outputs: .* has no sparse; .*sparse_linear\.pt"):
        embed(settings_for(**keys | {"model__name": str(tiny_model)}))
    assert STORAGE.list_files(f"{bucket}/out") == []
    embed(settings_for(**keys))
    assert embed(settings_for(**keys)).report.outcome == "nothing to do"
    assert "embedding" not in read_shards(f"{bucket}/out").column_names
    with pytest.raises(SettingsError, match=refused):
        build_index(settings_for(output__uri=f"{bucket}/out"))
    upload(bucket, {"queries.jsonl": b'{"_id": "1", "text": "fox"}'})
    asked = {"search__queries": f"{bucket}/queries.jsonl", "search__output": f"{bucket}/run"}
    with pytest.raises(SettingsError, match=refused):
        search(settings_for(output__uri=f"{bucket}/out", **asked))


@pytest.fixture
def start() -> Iterator[Callable[[Path, dict[str, object]], JobProcess]]:
    """Start a job; what still runs when a test has failed is killed."""
    with ExitStack() as ended:

        def start(log: Path, keys: dict[str, object]) -> JobProcess:
            run = JobProcess(log, keys)
            ended.callback(run.kill)
            return run

        yield start


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_outputs_survive_kills_of_driver_and_encoder(
    bucket: str, m3: Path, tmp_path: Path, start: Callable[[Path, dict[str, object]], JobProcess]
) -> None:
    records = [{**r, "text": r["text"][:600]} for r in docstrings(600)]
    upload(
        f"{bucket}/corpus", {f"{i}.jsonl": jsonl_bytes(records[i * 100 : i * 100 + 100]) for i in range(6)}
    )
    keys: dict[str, object] = {
        name.replace("__", "."): json.dumps(value) if isinstance(value, list) else value
        for name, value in keys_for(bucket, m3, batching__unit_rows=10, resources__num_encoders=1).items()
    }

    def markers() -> int:
        return len(STORAGE.list_files(f"{bucket}/out/done"))

    run = start(tmp_path / "log", keys)
    wait_until(lambda: markers() >= 5, 500)
    run.kill()
    before = markers()
    run = start(tmp_path / "log", keys)
    wait_until(lambda: markers() > before, 500)
    run.actors("ModelStage")[0].kill()
    assert run.wait(400) == 0, run.log()
    manifest = read_manifest(f"{bucket}/out")
    assert (manifest.rows_in, manifest.rows_out) == (600, 600)
    check_nothing_left_over(f"{bucket}/out")
    table = read_shards(f"{bucket}/out")
    assert table["passage_id"].to_pylist() == [r["id"] for r in records]
    undisturbed = start(tmp_path / "other", keys | {"output.uri": f"{bucket}/undisturbed"})
    assert undisturbed.wait(400) == 0, undisturbed.log()
    assert read_manifest(f"{bucket}/undisturbed") == manifest  # every file, byte for byte
