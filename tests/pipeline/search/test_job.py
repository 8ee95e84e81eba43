"""The search job on a real Ray and a real S3 server: truth is brute force over the stored vectors."""

import dataclasses
import hashlib
import json
import secrets
from pathlib import Path

import numpy as np
import pytest

from bge_ray.errors import (
    CorpusError,
    DamagedIndexError,
    DamagedShardError,
    DatasetMismatchError,
    ModelError,
    RejectedRowsError,
    SettingsError,
)
from bge_ray.model.spec import resolve_encoder
from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.index.job import build_index, read_index
from bge_ray.pipeline.search.job import plan_search, search
from bge_ray.records.canonical import from_json
from bge_ray.records.ids import split_vector_ids
from bge_ray.records.reports import SearchReport
from bge_ray.settings.sections import ModelSettings
from bge_ray.storage.objects import join
from bge_ray.storage.ownership import open_folder
from tests.support.corpora import csv_bytes, docstrings, jsonl_bytes, mixed_objects, parquet_bytes
from tests.support.datasets import vectors_by_id
from tests.support.models import make_cross_encoder, make_encoder
from tests.support.s3 import S3Server
from tests.support.searches import (
    STORAGE,
    assert_same_ranking,
    brute_force,
    by_query,
    jsonl,
    query_vectors,
    read_rejected,
    read_run,
    settings_for,
    upload,
)
from tests.support.slow import slow_but
from tests.support.vectors import VectorDataset, clustered

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PASSAGES = 900


@pytest.fixture(scope="module")
def root(s3_server: S3Server, ray_cluster: None, tiny_model: Path) -> str:
    """A data set of real passages in all formats, with an index of 8 ranges."""
    root = f"s3://out/search-{secrets.token_hex(4)}"
    passages = [{"id": p["id"], "title": p["title"], "text": p["text"]} for p in docstrings(PASSAGES)]
    upload(f"{root}/corpus", mixed_objects(passages))
    keys = {"corpus__uri": f"{root}/corpus", "output__uri": f"{root}/data", "model__name": str(tiny_model)}
    embed(settings_for(**keys, batching__unit_rows=100))
    records = [
        {"_id": f"q{i}", "text": f"how to {p['title']} with {i}"} for i, p in enumerate(passages[::20])
    ]
    upload(root, {"queries.jsonl": jsonl(records)})
    build_index(settings_for(output__uri=f"{root}/data", index__factory="IVF16,SQ8"))
    return root


@pytest.fixture(scope="module")
def queries(root: str) -> dict[str, str]:
    lines = STORAGE.read(f"{root}/queries.jsonl").splitlines()
    return {r["_id"]: r["text"] for r in map(json.loads, lines)}


def keys_for(root: str, output: str, **more: object) -> dict[str, object]:
    keys = {"output__uri": f"{root}/data", "search__queries": f"{root}/queries.jsonl"}
    return keys | {"search__output": output, "search__k": 10, "search__unit_queries": 16} | more


def test_exact_search_equals_numpy(root: str, bucket: str, tiny_model: Path, queries: dict[str, str]) -> None:
    report = search(settings_for(**keys_for(root, bucket, search__exact=True)))
    found = by_query(read_run(bucket))
    truth = brute_force(
        query_vectors(tiny_model, list(queries.values())), vectors_by_id(f"{root}/data"), k=10
    )
    assert list(found) == list(queries)  # in the order of the input, none lost, none doubled
    for ours, best in zip(found.values(), truth, strict=True):
        assert_same_ranking(ours, best)
    assert (report.queries_in, report.queries_out, report.results) == (45, 45, 450)
    assert report.index is None
    assert (report.rows_planned, report.rows_in, report.units_done) == (45, 45, report.units)
    assert sum(report.phase_s.values()) == pytest.approx(report.wall_s)
    assert {file.path for file in report.files} == {"run.parquet", "run.trec", "rejected.parquet"}
    for file in report.files:
        data = STORAGE.read(join(bucket, file.path))
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
    assert read_rejected(bucket) == []
    assert STORAGE.list_files(f"{bucket}/work") == []


@pytest.mark.parametrize(
    "how", slow_but([{"search__exact": True}], [{"search__exact": True}, {"search__rescore": 20}])
)
def test_a_damaged_shard_ends_the_search_once_and_for_good(
    root: str, bucket: str, how: dict[str, object]
) -> None:
    """By those that search shards, and by those that hold them for the rest."""
    data = f"{bucket}/data"
    for info in STORAGE.list_files(f"{root}/data"):
        STORAGE.write(info.uri.replace(f"{root}/data", data), STORAGE.read(info.uri))
    shard = STORAGE.list_files(f"{data}/embeddings")[1].uri
    made = bytearray(STORAGE.read(shard))
    made[len(made) // 2] ^= 4
    STORAGE.write(shard, bytes(made))
    with pytest.raises(DamagedShardError, match=rf"^{shard}: .*; remove it and run bge-ray embed") as caught:
        search(settings_for(**keys_for(root, f"{bucket}/run", output__uri=data, **how)))
    assert caught.value.exit_code == 2
    assert STORAGE.info(f"{bucket}/run/run.parquet") is None


@pytest.mark.slow
def test_four_range_shards_equal_the_single_file_and_all_lists_equal_exact_search(
    root: str, bucket: str, tiny_model: Path
) -> None:
    """160,000 vectors, because the smallest file of a range has 5 MB; of a model that can be asked."""
    model = resolve_encoder(ModelSettings(name=str(tiny_model)), on_gpu=False)
    data = f"{bucket}/data"
    made = VectorDataset(data, **{f.name: getattr(model, f.name) for f in dataclasses.fields(model)})
    for number in range(4):
        made.put(number, clustered(40_000, 32, seed=number))
    made.publish()
    runs = {}
    for layout, files in (("single", 1), ("ranges", 4)):
        build = {"index__factory": "IVF64,Flat", "index__layout": layout, "index__num_queries": 50}
        build_index(settings_for(output__uri=data, **build, index__range_bytes=5_500_000))
        assert len(read_index(STORAGE, data).files) >= files
        for nprobe in (3, 64):
            asked = keys_for(root, f"{bucket}/{layout}-{nprobe}", output__uri=data, search__nprobe=nprobe)
            search(settings_for(**asked, search__num_searchers=3))
            runs[layout, nprobe] = read_run(asked["search__output"])
        if layout == "single":
            twice = keys_for(root, f"{bucket}/twice", output__uri=data, search__nprobe=3)
            search(settings_for(**twice, search__num_searchers=3, search__replicas=2))
            assert read_run(twice["search__output"]) == runs["single", 3]
    assert runs["single", 3] == runs["ranges", 3]
    assert runs["single", 64] == runs["ranges", 64]
    assert runs["single", 3] != runs["single", 64]
    search(settings_for(**keys_for(root, f"{bucket}/exact", output__uri=data, search__exact=True)))
    ours, truth = by_query(runs["ranges", 64]), by_query(read_run(f"{bucket}/exact"))
    assert list(ours) == list(truth)
    for query_id in truth:
        assert_same_ranking(ours[query_id], truth[query_id])


@pytest.mark.slow
def test_rescoring_brings_the_order_of_exact_search(
    root: str, bucket: str, tiny_model: Path, queries: dict[str, str]
) -> None:
    keys = keys_for(root, bucket, search__nprobe=16, search__rescore=100)
    search(settings_for(**keys))
    truth = brute_force(
        query_vectors(tiny_model, list(queries.values())), vectors_by_id(f"{root}/data"), k=10
    )
    for ours, best in zip(by_query(read_run(bucket)).values(), truth, strict=True):
        assert_same_ranking(ours, best)


@pytest.mark.slow
def test_the_instruction_is_applied_replaced_and_switched_off(root: str, bucket: str, tmp_path: Path) -> None:
    """A folder that names its own instruction; truth is the same text put in front by hand."""
    model = make_encoder(tmp_path / "instructed")
    prompts = {"prompts": {"query": "the quick fox: ", "document": ""}}
    (model / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    upload(f"{bucket}/corpus", {"x.jsonl": jsonl_bytes(docstrings(PASSAGES)[:80])})
    data = f"{bucket}/data"
    embed(
        settings_for(
            corpus__uri=f"{bucket}/corpus",
            output__uri=data,
            model__name=str(model),
            resources__num_encoders=1,
        )
    )
    upload(bucket, {"q.jsonl": jsonl([{"_id": "a", "text": "a corpus"}, {"_id": "b", "text": "an index"}])})
    vectors = vectors_by_id(data)
    seen = []
    for instruction, override in [
        ("the quick fox: ", {}),
        ("", {"model__query_instruction": ""}),
        ("over ", {"model__query_instruction": "over "}),
    ]:
        output = f"{bucket}/run{len(seen)}"
        search(
            settings_for(
                output__uri=data,
                search__queries=f"{bucket}/q.jsonl",
                search__output=output,
                search__k=5,
                **override,
            )
        )
        found = by_query(read_run(output))
        texts = [instruction + text for text in ("a corpus", "an index")]
        truth = brute_force(query_vectors(model, texts, query_instruction=""), vectors, k=5)
        for ours, best in zip(found.values(), truth, strict=True):
            assert_same_ranking(ours, best)
        seen.append(found)
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.slow
def test_the_same_answer_in_every_format_and_unit_and_a_second_run_does_nothing(
    root: str, bucket: str, queries: dict[str, str]
) -> None:
    records = [{"id": name, "title": "", "text": text} for name, text in queries.items()]
    beir = {"beir/queries.jsonl": jsonl([{"_id": r["id"], "text": r["text"]} for r in records])}
    beir |= {"beir/corpus.jsonl": b"{}\n", "beir/qrels/test.tsv": b"query-id\tcorpus-id\tscore\n"}
    upload(bucket, {"q.csv": csv_bytes(records), "q.parquet": parquet_bytes(records), **beir})
    first = None
    for name, unit in (("q.csv", 7), ("q.parquet", 1000), ("beir", 16)):
        keys = keys_for(root, f"{bucket}/run-{unit}", search__queries=f"{bucket}/{name}")
        keys["search__unit_queries"] = unit
        search(settings_for(**keys))
        found = by_query(read_run(keys["search__output"]))
        first = first or found
        assert list(found) == list(first) == list(queries)
        for query_id, pairs in found.items():  # other batches, other last bits
            assert_same_ranking(pairs, first[query_id])
    again = search(settings_for(**keys))
    assert again.outcome == "nothing to do"


def test_queries_that_cannot_be_answered_are_named_and_the_rest_is_done(root: str, bucket: str) -> None:
    lines = [{"_id": f"good{i}", "text": f"a good query {i}"} for i in range(20)]
    bad = [
        {"_id": "none"},
        {"_id": "empty", "text": "  "},
        {"_id": "number", "text": 7},
        {"text": "no id"},
        {"_id": "good3", "text": "the id of another"},
    ]
    data = jsonl(lines[:10]) + jsonl(bad) + b"not json\n" + jsonl(lines[10:])
    upload(bucket, {"q.jsonl": data + json.dumps({"_id": "long", "text": "fox " * 50_000}).encode()})
    keys = keys_for(root, f"{bucket}/run", search__queries=f"{bucket}/q.jsonl")
    with pytest.raises(RejectedRowsError, match="the run is published, but"):
        search(settings_for(**keys))
    found = by_query(read_run(f"{bucket}/run"))
    assert list(found) == [r["_id"] for r in lines] + ["long"]
    assert {len(pairs) for pairs in found.values()} == {10}
    reasons = sorted(reason for *_, reason in read_rejected(f"{bucket}/run"))
    assert reasons == sorted(
        ["null_text", "empty_text", "non_string_text", "null_id", "duplicate_id", "malformed_line"]
    )
    report = from_json(SearchReport, STORAGE.read(f"{bucket}/run/report.json"))
    assert (report.queries_in, report.queries_out, report.truncated_queries) == (27, 21, 1)


@pytest.mark.slow
def test_a_wrong_index_or_model_is_refused_and_an_old_index_is_told_of(
    root: str, bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    upload(
        f"{bucket}/corpus",
        {f"{i}.jsonl": jsonl_bytes(docstrings(PASSAGES)[i * 60 : i * 60 + 60]) for i in range(3)},
    )
    data = f"{bucket}/data"
    embedding = {"corpus__uri": f"{bucket}/corpus", "output__uri": data, "model__name": str(tiny_model)}
    embed(settings_for(**embedding))
    build_index(settings_for(output__uri=data, index__factory="Flat"))
    keys = keys_for(root, f"{bucket}/run", output__uri=data)
    other = make_encoder(tmp_path / "other", seed=3)
    with pytest.raises(DatasetMismatchError, match="queries need the same model"):
        search(settings_for(**keys, model__name=str(other)))
    with pytest.raises(ModelError, match="no such folder"):
        search(settings_for(**keys, model__name="/no/such/folder"))
    uri = join(data, "index", "index.json")
    description = json.loads(STORAGE.read(uri))
    folder = open_folder(STORAGE, join(data, "index"), "index", "output.uri")
    folder.put("index.json", json.dumps(description | {"vector_fingerprint": "f" * 64}).encode())
    with pytest.raises(DatasetMismatchError, match="another model"):
        search(settings_for(**keys))
    assert STORAGE.list_files(f"{bucket}/run") == []
    # Another training under the same description: the file is not the one that was published.
    folder.put("index.json", json.dumps(description).encode())
    file = join(data, "index", description["files"][0]["path"])
    whole = STORAGE.read(file)
    STORAGE.write(file, whole[:-8] + bytes(8))
    with pytest.raises(DamagedIndexError, match="is damaged"):
        search(settings_for(**keys))
    STORAGE.write(file, whole)
    # An object is gone from the corpus since: its passages must not come up, under whatever name.
    STORAGE.delete([f"{bucket}/corpus/1.jsonl"])
    embed(settings_for(**embedding))
    report = search(settings_for(**keys))
    assert report.unknown_ids > 0
    there = set(vectors_by_id(data))
    found = by_query(read_run(f"{bucket}/run"))
    assert len(found) == 45
    assert {passage_id for pairs in found.values() for passage_id, _ in pairs} <= there


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_reranking_in_the_same_job_equals_the_rerank_job(
    root: str, bucket: str, tmp_path: Path, share: float
) -> None:
    from bge_ray.pipeline.rerank.job import rerank

    model = make_cross_encoder(tmp_path / "ce", positions=128)
    shared = {
        "rerank__model": str(model),
        "rerank__depth": 5,
        "rerank__unit_pairs": 40,
        "rerank__join_pairs": 100,
        "rerank__first_stage_share": share,
    }
    keys = keys_for(root, f"{bucket}/one", **shared, search__rerank=True)
    report = search(settings_for(**keys))
    assert report.scoring.pairs_out == 45 * 5
    one, two = f"{bucket}/one/reranked", f"{bucket}/two"
    keys = {"output__uri": f"{root}/data", "search__queries": f"{root}/queries.jsonl", **shared}
    again = rerank(settings_for(**keys, rerank__candidates=f"{bucket}/one", rerank__output=two))
    assert again.pairs_out == 45 * 5
    ours, theirs = read_run(one), read_run(two)
    same = ("query_id", "passage_id", "rank", "vector_id")
    assert [[r[n] for n in same] for r in ours] == [[r[n] for n in same] for r in theirs]
    np.testing.assert_allclose([r["score"] for r in ours], [r["score"] for r in theirs], atol=1e-5)
    first = by_query(read_run(f"{bucket}/one"))
    for query_id, pairs in by_query(ours).items():
        assert {p for p, _ in pairs} == {p for p, _ in first[query_id][:5]}


@pytest.mark.slow
def test_of_two_passages_of_one_id_both_jobs_score_the_one_that_was_found(
    bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The twin that lies second is the one that is found: by its id alone the first would be scored."""
    from bge_ray.pipeline.rerank.job import rerank

    found, other = "how to fold a paper crane", "a ship on the wide sea"
    upload(
        f"{bucket}/corpus",
        {
            "0.jsonl": jsonl(
                [{"id": "twin", "text": other}, *({"id": f"a{i}", "text": f"a {i}"} for i in range(9))]
            ),
            "1.jsonl": jsonl([{"id": "twin", "text": found}]),
        },
    )
    upload(bucket, {"q.jsonl": jsonl([{"_id": "q", "text": found}])})
    data, one, two = (f"{bucket}/{name}" for name in ("data", "one", "two"))
    embed(settings_for(corpus__uri=f"{bucket}/corpus", output__uri=data, model__name=str(tiny_model)))
    model = make_cross_encoder(tmp_path / "ce", positions=64)
    keys = {"output__uri": data, "search__queries": f"{bucket}/q.jsonl", "rerank__model": str(model)}
    search(settings_for(**keys, search__output=one, search__k=10, search__rerank=True))
    [twin] = [row for row in read_run(one) if row["passage_id"] == "twin"]
    assert int(split_vector_ids(np.array([twin["vector_id"]])).object_no[0]) == 1
    rerank(settings_for(**keys, rerank__candidates=one, rerank__output=two))
    ours, theirs = by_query(read_run(f"{one}/reranked"))["q"], by_query(read_run(two))["q"]
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    np.testing.assert_allclose([score for _, score in ours], [score for _, score in theirs], atol=1e-5)


@pytest.mark.slow
def test_ids_that_a_trec_run_cannot_hold_leave_only_parquet(bucket: str, root: str, tiny_model: Path) -> None:
    passages = [{"id": f"with space {i}", "title": "", "text": f"the fox {i}"} for i in range(30)]
    upload(f"{bucket}/corpus", {"x.jsonl": jsonl_bytes(passages)})
    data = f"{bucket}/data"
    embed(
        settings_for(
            corpus__uri=f"{bucket}/corpus",
            output__uri=data,
            model__name=str(tiny_model),
            resources__num_encoders=1,
        )
    )
    report = search(settings_for(**keys_for(root, f"{bucket}/run", output__uri=data)))
    assert "white space" in report.without_trec[0]
    assert STORAGE.info(f"{bucket}/run/run.trec") is None
    assert STORAGE.info(f"{bucket}/run/run.parquet") is not None


def test_what_is_missing_is_said_before_anything_starts(root: str, bucket: str) -> None:
    with pytest.raises(SettingsError, match=r"search\.queries, search\.output"):
        search(settings_for(output__uri=f"{root}/data"))
    with pytest.raises(SettingsError, match="no complete data set"):
        search(settings_for(**keys_for(root, bucket, output__uri=f"{bucket}/nothing")))
    with pytest.raises(CorpusError, match="no such file"):
        search(settings_for(**keys_for(root, bucket, search__queries=f"{bucket}/nothing.jsonl")))
    line = plan_search(settings_for(**keys_for(root, bucket)))
    assert "45 queries" in line
    assert "IVF16,SQ8" in line
    assert STORAGE.info(f"{bucket}/run.parquet") is None
