"""The embed job on a real Ray and a real S3 server: what goes in comes out, once."""

import copy
import gc
import gzip
import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from bge_ray.dataset.folder import Dataset
from bge_ray.errors import (
    BgeRayError,
    CorpusError,
    DatasetMismatchError,
    IncompleteRunError,
    ModelError,
    RejectedRowsError,
    SettingsError,
)
from bge_ray.pipeline.embed.job import embed, plan_only
from bge_ray.pipeline.embed.prepare import prepare
from bge_ray.records.canonical import to_json
from bge_ray.records.dataset import make_manifest
from bge_ray.records.ids import split_vector_ids
from bge_ray.settings.sections import Settings, parse_settings
from bge_ray.storage.objects import Storage, join
from tests.support.corpora import docstrings, jsonl_bytes, mixed_objects, parquet_bytes
from tests.support.datasets import check_nothing_left_over, read_manifest, read_shards, vectors_by_id
from tests.support.poison import make_poisonous
from tests.support.runs import JobProcess

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

STORAGE = Storage(20)


def upload(root: str, objects: dict[str, bytes]) -> str:
    for name, data in objects.items():
        STORAGE.write(join(root, name), data)
    return root


def settings_for(root: str, model: Path, *overrides: str) -> Settings:
    keys = {
        "corpus.uri": f"{root}/corpus",
        "output.uri": f"{root}/out",
        "model.name": model,
        "batching.unit_rows": 60,
        "resources.num_encoders": 1,
        "output.storage_timeout_s": 20,
        "output.grace_s": 0,
    }
    return parse_settings(None, [f"{k}={v}" for k, v in keys.items()] + list(overrides))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture(scope="module")
def passages() -> list[dict[str, str]]:
    return docstrings(600)


def test_every_row_of_every_format_comes_out_once(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    upload(f"{bucket}/corpus", mixed_objects(passages))
    result = embed(settings_for(bucket, tiny_model, "corpus.keep_columns=[title]"))
    table = read_shards(f"{bucket}/out")
    assert table["passage_id"].to_pylist() == [p["id"] for p in passages]  # objects sort as they were cut
    assert table["title"].to_pylist() == [p["title"] for p in passages]
    assert result.report.rows_in == result.report.rows_out == len(passages)
    assert result.report.rows_rejected == 0
    norms = np.linalg.norm(np.stack(list(vectors_by_id(f"{bucket}/out").values())), axis=1)
    assert np.abs(norms - 1).max() < 1e-6
    check_nothing_left_over(f"{bucket}/out")


@pytest.mark.slow
def test_vectors_do_not_depend_on_format_units_or_encoders(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    some = passages[:150]
    upload(f"{bucket}/a/corpus", mixed_objects(some))
    upload(f"{bucket}/b/corpus", {"all.parquet": parquet_bytes(some)})
    embed(settings_for(f"{bucket}/a", tiny_model, "resources.num_encoders=2"))
    embed(settings_for(f"{bucket}/b", tiny_model, "batching.unit_rows=1000"))
    one, other = vectors_by_id(f"{bucket}/a/out"), vectors_by_id(f"{bucket}/b/out")
    assert one.keys() == other.keys()
    assert max(np.abs(one[k] - other[k]).max() for k in one) < 1e-6


@pytest.mark.slow
def test_same_input_same_bytes_and_a_second_run_does_nothing(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    upload(f"{bucket}/corpus", mixed_objects(passages[:200]))
    first = embed(settings_for(bucket, tiny_model))
    again = embed(settings_for(bucket, tiny_model))
    assert again.report.outcome == "nothing to do"
    assert again.manifest == first.manifest
    fresh = embed(settings_for(bucket, tiny_model, f"output.uri={bucket}/fresh"))
    assert fresh.manifest == first.manifest  # sha256 of every file included


def test_new_changed_and_removed_objects_are_all_that_is_done(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    objects = {f"{i}.jsonl": jsonl_bytes(passages[i * 50 : i * 50 + 50]) for i in range(4)}
    upload(f"{bucket}/corpus", objects)
    before = embed(settings_for(bucket, tiny_model)).manifest
    upload(
        f"{bucket}/corpus",
        {"1.jsonl": jsonl_bytes(passages[300:340]), "9.jsonl": jsonl_bytes(passages[400:420])},
    )
    STORAGE.delete([f"{bucket}/corpus/0.jsonl"])
    gone = "1 object with 50 rows (25%)"
    with pytest.raises(CorpusError, match=rf"{re.escape(gone)}.*/0\.jsonl of .* allows 24%: raise it"):
        embed(settings_for(bucket, tiny_model, "output.max_removed_fraction=0.24"))
    with pytest.raises(CorpusError, match=r"4 objects with 200 rows \(100%\)"):
        plan_only(settings_for(bucket, tiny_model, f"corpus.uri={bucket}/corpus/9.jsonl"))
    told = plan_only(settings_for(bucket, tiny_model, "output.max_removed_fraction=0.25")).lines()
    assert any(line.startswith(f"gone             {gone}") for line in told)
    result = embed(settings_for(bucket, tiny_model))
    assert result.report.rows_in == 60
    assert (result.report.objects_removed, result.report.rows_removed) == (1, 50)
    assert [uri.rpartition("/")[2] for uri in result.report.removed_uris] == ["0.jsonl"]
    ids = [p["id"] for p in passages]
    assert set(vectors_by_id(f"{bucket}/out")) == set(ids[100:200]) | set(ids[300:340]) | set(ids[400:420])
    kept = {m.unit: m for m in before.shards}
    assert [m for m in result.manifest.shards if m.unit in kept] == [
        m for m in before.shards if m.unit.object_no in (2, 3)
    ]
    assert {m.unit.object_no for m in result.manifest.shards} == {2, 3, 4, 5}  # numbers are never given twice
    check_nothing_left_over(f"{bucket}/out")


@pytest.mark.slow
def test_a_process_of_its_own_resumes_what_another_planned(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]], tmp_path: Path
) -> None:
    # Nothing of the corpus changed, so planning needs no Ray: the work itself has to start it.
    upload(f"{bucket}/corpus", {"x.jsonl": jsonl_bytes(passages[:90])})
    settings = settings_for(bucket, tiny_model)
    before = embed(settings).manifest
    STORAGE.delete([f"{bucket}/out/manifest.json"])
    keys = {
        "corpus.uri": f"{bucket}/corpus",
        "output.uri": f"{bucket}/out",
        "model.name": tiny_model,
        "resources.num_encoders": 1,
    }
    run = JobProcess(tmp_path / "log", keys)
    assert run.wait() == 0, run.log()
    assert read_manifest(f"{bucket}/out") == before


@pytest.mark.slow
def test_chunks_of_long_texts_lie_where_they_say_and_have_vectors_of_their_own(
    bucket: str, tiny_model: Path
) -> None:
    sentence = "the quick brown fox number {} jumps over the lazy dog."
    texts = {
        "short": "a corpus in object storage.",
        "long": " ".join(sentence.format(n) for n in range(40)),
        "chinese": "为这个句子生成表示。" * 40,
        "endless": "fox jumps over it. " * 60_000,
        "bad": "",
    }
    rows = [{"id": key, "title": f"title of {key}", "text": text} for key, text in texts.items()]
    rows[-1]["title"] = ""
    upload(f"{bucket}/corpus", {"x.jsonl": jsonl_bytes(rows)})
    keys = ["chunking.max_tokens=40", "chunking.overlap_tokens=16", "chunking.titles=every"]
    settings = settings_for(
        bucket, tiny_model, *keys, "chunking.keep_text=true", "corpus.max_rejected_fraction=0.5"
    )
    result = embed(settings)
    assert (result.report.rows_in, result.report.rows_out, result.report.rows_rejected) == (5, 3, 2)
    rejected = {r["passage_id"]: r["reason"] for r in read_shards(f"{bucket}/out", "rejected").to_pylist()}
    assert rejected == {"endless": "too_many_chunks", "bad": "empty_text"}
    table = read_shards(f"{bucket}/out")
    assert result.manifest.vectors == len(table) > 20
    places = split_vector_ids(table["vector_id"].to_numpy())
    assert places.chunk_no.tolist() == table["chunk_no"].to_pylist()
    assert int(table["n_tokens"].to_numpy().max()) <= 40
    assert not any(table["truncated"].to_pylist())
    chunks: dict[str, list[dict[str, object]]] = {}
    for row in table.to_pylist():
        chunks.setdefault(row["passage_id"], []).append(row)
        assert texts[row["passage_id"]][row["start"] : row["end"]] == row["chunk_text"]
    assert {key: [c["chunk_no"] for c in found] for key, found in chunks.items()} == {
        key: list(range(len(found))) for key, found in chunks.items()
    }
    assert [c["start"] for c in chunks["short"]] == [0] and len(chunks["long"]) > 10
    assert all(str(c["chunk_text"]).endswith("dog.") for c in chunks["long"])
    assert all(str(c["chunk_text"]).endswith("。") for c in chunks["chinese"])
    # A chunk has the vector of a passage that is its title and its text.
    alone = [
        {"id": f"{key}-{c['chunk_no']}", "title": f"title of {key}", "text": c["chunk_text"]}
        for key, found in chunks.items()
        for c in found
    ]
    upload(f"{bucket}/alone", {"x.jsonl": jsonl_bytes(alone)})
    embed(
        settings_for(f"{bucket}", tiny_model, f"corpus.uri={bucket}/alone", f"output.uri={bucket}/alone-out")
    )
    vectors = vectors_by_id(f"{bucket}/alone-out")
    for key, found in chunks.items():
        for chunk in found:
            assert np.abs(np.asarray(chunk["embedding"]) - vectors[f"{key}-{chunk['chunk_no']}"]).max() < 1e-5
    with pytest.raises(DatasetMismatchError, match=r"chunking.max_tokens: there 40, now 64"):
        embed(settings_for(bucket, tiny_model, *keys, "chunking.max_tokens=64", "chunking.keep_text=true"))
    with pytest.raises(SettingsError, match=r"chunking.max_tokens 600: the model keeps"):
        embed(settings_for(bucket, tiny_model, "chunking.max_tokens=600"))


BAD_LINES = [
    (b'{"id": "null text", "text": null}', "null_text"),
    (b'{"id": "no text"}', "null_text"),
    (b'{"id": "empty", "text": ""}', "empty_text"),
    (b'{"id": "blank", "text": " \\n\\t\\u3000"}', "empty_text"),
    (b'{"id": "number", "text": 7}', "non_string_text"),
    (b'{"id": null, "text": "no id"}', "null_id"),
    (b'{"text": "no id at all"}', "null_id"),
    (b'{"id": 1.5, "text": "float id"}', "non_string_id"),
    (b'{"id": "good 0", "text": "the id of another row"}', "duplicate_id"),
    (b'{"id": "surrogate", "text": "lone \\ud800 surrogate"}', "invalid_unicode"),
    (b'{"id": "bytes", "text": "\xff\xfe"}', "invalid_unicode"),
    (b'{"id": "cut", "text": "no end', "malformed_line"),
    (b'["a", "list"]', "malformed_line"),
]


@pytest.mark.slow
def test_small_objects_go_together_and_come_out_one_by_one(bucket: str, tiny_model: Path) -> None:
    """Of a group that was cut off only what is missing is written, with the bytes of an undisturbed run."""
    small = [
        {"id": f"{i}-{j}", "text": f"object {i} row {j} " * (1 + i * 37 % 90)}
        for i in range(40)
        for j in range(3)
    ]
    objects = {f"{i:02d}.jsonl": jsonl_bytes(small[3 * i : 3 * i + 3]) for i in range(40)}
    objects["07.jsonl"] += b'{"id": "7-3", "text": ""}\n'
    upload(f"{bucket}/corpus", objects)
    limits = ["batching.unit_rows=auto", "corpus.max_rejected_fraction=0.1"]
    clean = embed(settings_for(bucket, tiny_model, *limits))
    assert (clean.report.rows_in, clean.report.rows_out, clean.report.units_done) == (121, 120, 40)
    assert [(m.unit.object_no, m.unit.n_rows) for m in clean.manifest.shards] == [
        (i, 4 if i == 7 else 3) for i in range(40)
    ]
    assert read_shards(f"{bucket}/out")["passage_id"].to_pylist() == [row["id"] for row in small]
    lost = [m.embeddings.path for m in clean.manifest.shards if m.unit.object_no % 3]
    STORAGE.delete([f"{bucket}/out/{path}" for path in lost])
    again = embed(settings_for(bucket, tiny_model, *limits))
    assert again.report.units_done == len(lost)
    assert again.manifest == clean.manifest  # sha256 of every file included
    # One of them changes, one goes: the others stay as they are.
    upload(f"{bucket}/corpus", {"20.jsonl": jsonl_bytes(small[:2])})
    STORAGE.delete([f"{bucket}/corpus/21.jsonl"])
    third = embed(settings_for(bucket, tiny_model, *limits))
    assert third.report.units_done == 1
    kept = {m.unit.object_no: m for m in clean.manifest.shards if m.unit.object_no not in (20, 21)}
    assert {m.unit.object_no: m for m in third.manifest.shards if m.unit.object_no < 40} == kept


def test_without_its_dataset_json_nothing_is_mixed_in(bucket: str, tiny_model: Path) -> None:
    """Of a complete data set it must be restored; a run that died before writing it is planned again."""
    upload(
        f"{bucket}/corpus", {"a.jsonl": jsonl_bytes([{"id": str(i), "text": f"text {i}"} for i in range(30)])}
    )
    settings = settings_for(bucket, tiny_model)
    plan = prepare(settings).plan
    dataset = Dataset(STORAGE, f"{bucket}/out")
    dataset.folder.claim()
    dataset.create_plan(1, plan)
    again = prepare(settings)
    assert (again.previous_number, again.plan, again.todo_rows) == (1, plan, 30)
    dataset.folder.put("manifest.json", to_json(make_manifest(again.spec.vector_fingerprint, [])))
    with pytest.raises(DatasetMismatchError, match=r"dataset\.json is gone.*restore it"):
        prepare(settings)


def test_each_bad_row_is_rejected_with_its_reason_and_the_rest_is_done(bucket: str, tiny_model: Path) -> None:
    good = [json.dumps({"id": f"good {i}", "text": f"a good passage number {i}"}).encode() for i in range(30)]
    good += [b'{"id": "nul", "text": "a NUL \\u0000 inside"}', b'{"id": 7, "text": "an integer id"}']
    good.append(json.dumps({"id": "huge", "text": "many words " * 1_000_000}).encode())
    lines = good[:20] + [line for line, _ in BAD_LINES] + good[20:]
    upload(f"{bucket}/corpus", {"x.jsonl": b"\n".join(lines)})
    result = embed(settings_for(bucket, tiny_model, "corpus.max_rejected_fraction=0.5"))
    assert (result.report.rows_in, result.report.rows_out) == (len(lines), len(good))
    rejected = read_shards(f"{bucket}/out", "rejected").to_pylist()
    places = split_vector_ids(np.array([r["vector_id"] for r in rejected]))
    assert (set(places.object_no), set(places.chunk_no)) == ({0}, {0})
    assert [(row, r["reason"]) for row, r in zip(places.row_no, rejected, strict=True)] == [
        (20 + i, reason) for i, (_, reason) in enumerate(BAD_LINES)
    ]
    table = read_shards(f"{bucket}/out")
    huge = dict(zip(table["passage_id"].to_pylist(), table["truncated"].to_pylist(), strict=True))
    assert {name for name, cut in huge.items() if cut} == {"huge"}


@pytest.mark.slow
def test_too_many_rejected_rows_stop_the_run_and_a_higher_limit_resumes_it(
    bucket: str, tiny_model: Path
) -> None:
    lines = [json.dumps({"id": str(i), "text": "" if i % 4 == 0 else "text"}).encode() for i in range(200)]
    upload(f"{bucket}/corpus", {"x.jsonl": b"\n".join(lines)})
    with pytest.raises(RejectedRowsError, match="empty_text"):
        embed(settings_for(bucket, tiny_model))
    assert STORAGE.read_optional(f"{bucket}/out/manifest.json") is None
    result = embed(settings_for(bucket, tiny_model, "corpus.max_rejected_fraction=0.3"))
    assert (result.manifest.rows_out, result.manifest.rows_rejected) == (150, 50)


def actors_alive() -> Counter[str]:
    """Count the actors that live by their class."""
    actors = ray._private.state.actors().values()
    return Counter(actor["ActorClassName"] for actor in actors if actor["State"] == "ALIVE")


@pytest.mark.slow
@pytest.mark.parametrize("succeeds", [True, False])
def test_a_job_leaves_no_actor_in_a_ray_that_goes_on(bucket: str, tiny_model: Path, succeeds: bool) -> None:
    """Also while its error is kept, as a notebook keeps the last one; Python tidies up at no other time."""
    lines = [json.dumps({"id": str(i), "text": "" if i % 4 == 0 else "text"}).encode() for i in range(300)]
    upload(f"{bucket}/corpus", {"x.jsonl": b"\n".join(lines)})
    limit = "corpus.max_rejected_fraction=" + ("0.3" if succeeds else "0.1")
    ray.get(ray.remote(lambda: 0).remote())
    before = actors_alive()
    kept = None
    gc.disable()
    try:
        try:
            embed(settings_for(bucket, tiny_model, limit, "batching.unit_rows=20"))
        except RejectedRowsError as error:
            kept = error
        assert (kept is None) == succeeds
        deadline = time.monotonic() + 30
        # Those of Ray Data itself stay for the next data path.
        while left := {"Ledger", "MapWorker(MapBatches(ModelStage))"} & (actors_alive() - before).keys():
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
    finally:
        gc.enable()


@pytest.mark.slow
def test_ray_data_of_the_process_stays_as_it_was(bucket: str, tiny_model: Path) -> None:
    """A notebook's own paths would otherwise be cut into blocks of one byte, and show no progress."""
    upload(f"{bucket}/corpus", {"x.jsonl": jsonl_bytes([{"id": "1", "text": "one"}])})
    context = ray.data.DataContext.get_current()
    before = copy.deepcopy(vars(context))
    embed(settings_for(bucket, tiny_model))
    assert ray.data.DataContext.get_current() is context
    assert vars(context) == before


def test_unreadable_objects_are_all_named_and_nothing_is_written(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    whole = parquet_bytes(passages[:100])
    packed = gzip.compress(jsonl_bytes(passages[:100]))
    upload(
        f"{bucket}/corpus",
        {
            "ok.parquet": whole,
            "cut.parquet": whole[: len(whole) // 2],
            "cut.jsonl.gz": packed[: len(packed) // 2],
        },
    )
    with pytest.raises(CorpusError) as caught:
        embed(settings_for(bucket, tiny_model))
    assert "cut.parquet" in str(caught.value)
    assert "cut.jsonl.gz" in str(caught.value)
    assert STORAGE.list_files(f"{bucket}/out") == []


@pytest.mark.slow
def test_a_page_that_cannot_be_decoded_leaves_only_its_unit_undone(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    data = bytearray(parquet_bytes(passages[:180], row_group_size=60))
    data[2000:2400] = b"\xff" * 400  # inside the first row group
    upload(f"{bucket}/corpus", {"bad.parquet": bytes(data), "good.jsonl": jsonl_bytes(passages[200:260])})
    with pytest.raises(IncompleteRunError, match="1 of 4 units"):
        embed(settings_for(bucket, tiny_model))
    report = json.loads(STORAGE.read(f"{bucket}/out/report.json"))
    assert report["units_done"] == 3
    assert "bad.parquet rows 0 to 59" in report["failures"][0]
    upload(f"{bucket}/corpus", {"bad.parquet": parquet_bytes(passages[:180], row_group_size=60)})
    assert embed(settings_for(bucket, tiny_model)).manifest.rows_out == 240


@pytest.mark.slow
def test_other_settings_or_weights_are_refused_and_named(
    bucket: str, tiny_model: Path, tmp_path: Path, passages: list[dict[str, str]]
) -> None:
    from tests.support.models import make_encoder

    upload(f"{bucket}/corpus", {"x.jsonl": jsonl_bytes(passages[:40])})
    before = embed(settings_for(bucket, tiny_model)).manifest
    other = make_encoder(tmp_path / "other", seed=1)
    for model, override, named in [
        (tiny_model, "model.max_length=16", "model.max_length: there 512, now 16"),
        (tiny_model, "model.pooling=mean", "model.pooling"),
        (tiny_model, "output.dtype=float16", "dtype: there 'float32', now 'float16'"),
        (tiny_model, "model.passage_instruction='passage: '", "model.passage_instruction"),
        (other, "model.max_length=512", "model.weights_sha256"),
    ]:
        with pytest.raises(DatasetMismatchError, match=named):
            embed(settings_for(bucket, model, override))
    assert read_manifest(f"{bucket}/out") == before


@pytest.mark.slow
def test_dry_run_counts_and_writes_nothing(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    upload(f"{bucket}/corpus", mixed_objects(passages[:300]))
    estimate = plan_only(settings_for(bucket, tiny_model, "report.price_per_hour=2"))
    assert (estimate.objects, estimate.rows, estimate.rows_todo) == (5, 300, 300)
    assert STORAGE.list_files(f"{bucket}/out") == []
    result = embed(settings_for(bucket, tiny_model))
    assert estimate.tokens == pytest.approx(result.report.tokens, rel=0.5)
    assert estimate.output_bytes == pytest.approx(result.report.bytes_out, rel=0.6)


@pytest.mark.parametrize(
    ("objects", "overrides", "message"),
    [
        ({}, [], "no such file or folder"),
        ({"empty.jsonl": b""}, [], "no rows in any"),
        ({"readme.txt": b"hello"}, [], "known ending"),
        ({"x.jsonl": b'{"id": "1", "body": "text"}'}, [], r"no column 'text' \(corpus.text_column\)"),
        ({"x.jsonl": b'{"key": "1", "text": "text"}'}, [], "no id column"),
        ({"x.jsonl": b'{"id": "1", "text": "text"}'}, ["corpus.keep_columns=[lang]"], "no column 'lang'"),
        ({"x.jsonl": b'{"id": "1", "text": "text"}'}, ["model.name=/no/such/folder"], "no such folder"),
        ({"x.jsonl": b'{"id": "1", "text": "text"}'}, ["model.max_length=4096"], "max_length 4096"),
        (
            {"x.jsonl": b'{"id": "1", "text": "text"}'},
            ["index.build=true", "index.factory=NSG32"],
            "'HNSW32'",
        ),
        (
            {"x.jsonl": b'{"id": "1", "text": "text"}'},
            ["index.build=true", "index.factory=IVF16,SQ8"],
            "'auto'",
        ),
        (
            {"x.jsonl": b'{"id": "1", "text": "text"}'},
            ["index.build=true", "model.normalize=false"],
            "normalised",
        ),
        (
            {"x.jsonl": b'{"id": "1", "text": "text"}'},
            ["index.build=true", "index.queries=/no/such/file.jsonl"],
            "/no/such/file.jsonl",
        ),
    ],
)
def test_input_that_cannot_be_used_is_refused_before_anything_is_written(
    bucket: str, tiny_model: Path, objects: dict[str, bytes], overrides: list[str], message: str
) -> None:
    upload(f"{bucket}/corpus", objects)
    with pytest.raises(BgeRayError, match=message) as caught:
        embed(settings_for(bucket, tiny_model, *overrides))
    assert caught.value.exit_code == 2
    assert STORAGE.list_files(f"{bucket}/out") == []


@pytest.mark.slow
def test_a_model_that_needs_trust_is_refused_without_it_first_and_later(
    bucket: str, tmp_path: Path, passages: list[dict[str, str]]
) -> None:
    model = make_poisonous(tmp_path / "model", "zzz")
    distrusting = settings_for(bucket, model)
    upload(f"{bucket}/corpus", {"x.jsonl": jsonl_bytes(passages[:20])})
    with pytest.raises(ModelError, match="trust_remote_code"):
        embed(distrusting)
    assert STORAGE.list_files(f"{bucket}/out") == []

    embed(settings_for(bucket, model, "model.trust_remote_code=true"))
    STORAGE.delete(
        [f"{bucket}/out/manifest.json", *(i.uri for i in STORAGE.list_files(f"{bucket}/out/done"))]
    )
    left = STORAGE.list_files(f"{bucket}/out")
    with pytest.raises(ModelError, match="trust_remote_code"):
        embed(distrusting)
    assert STORAGE.list_files(f"{bucket}/out") == left


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_with_space_it_goes_on(
    small_disk: Path, bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    upload(f"{bucket}/corpus", mixed_objects(passages[:400]))
    settings = settings_for(bucket, tiny_model, f"output.uri={small_disk}/out", "batching.unit_rows=20")
    with pytest.raises(BgeRayError, match=r"(?i)no space") as caught:
        embed(settings)
    assert caught.value.exit_code == 1
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert embed(settings).manifest.rows_out == 400
    check_nothing_left_over(f"{small_disk}/out")
