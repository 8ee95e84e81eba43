"""Texts that have vectors are not encoded again, and what comes out is what a clean run makes."""

import random
import threading
from pathlib import Path

import numpy as np
import pytest

from bge_ray.dataset.folder import Dataset
from bge_ray.dataset.reader import open_reader
from bge_ray.errors import BgeRayError, StorageError
from bge_ray.pipeline.embed.estimate import Share
from bge_ray.pipeline.embed.job import embed, plan_only
from bge_ray.pipeline.embed.prepare import prepare
from bge_ray.records.reports import EmbedReport
from bge_ray.settings.sections import Settings, parse_settings
from bge_ray.storage.objects import Storage, join
from tests.support.corpora import docstrings, jsonl_bytes, parquet_bytes
from tests.support.datasets import check_nothing_left_over, read_manifest, read_shards
from tests.support.models import make_m3

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

STORAGE = Storage(20)
# Which texts share a batch decides the last bits of their vectors.
LAST_BITS = 1e-5


def upload(root: str, objects: dict[str, bytes]) -> None:
    for name, data in objects.items():
        STORAGE.write(join(root, "corpus", name), data)


def settings_for(root: str, model: Path, *overrides: str, out: str = "out") -> Settings:
    keys = {
        "corpus.uri": f"{root}/corpus",
        "output.uri": f"{root}/{out}",
        "model.name": model,
        "batching.unit_rows": 60,
        "resources.num_encoders": 1,
        "output.storage_timeout_s": 20,
        "output.grace_s": 0,
    }
    return parse_settings(None, [f"{k}={v}" for k, v in keys.items()] + list(overrides))


def rows_of(root: str, out: str = "out") -> list[dict[str, object]]:
    """Return all rows of a data set but for their ids, in order of passage id and chunk."""
    table = read_shards(f"{root}/{out}").drop_columns(["vector_id"])
    rows = table.to_pylist()
    return sorted(rows, key=lambda row: (row["passage_id"], row.get("chunk_no", 0)))


def check_as_if_clean(root: str, model: Path, *overrides: str) -> None:
    """The data set has the rows of a clean run, value for value; vectors to their last bits."""
    embed(settings_for(root, model, "output.reuse=off", *overrides, out="clean"))
    ours, clean = rows_of(root), rows_of(root, "clean")
    assert len(ours) == len(clean)
    for mine, other in zip(ours, clean, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            if name in ("embedding", "sparse", "colbert"):
                assert_alike(mine[name], other[name])
            else:
                assert mine[name] == other[name], name


def assert_alike(mine: object, other: object) -> None:
    if isinstance(mine, dict):
        weights, theirs = (dict(zip(v["indices"], v["values"], strict=True)) for v in (mine, other))
        assert max(abs(weights.get(k, 0) - theirs.get(k, 0)) for k in weights | theirs) < 1e-2
    elif isinstance(mine[0], bytes):
        one, two = (np.frombuffer(b"".join(v), np.float16).astype(np.float32) for v in (mine, other))
        assert one.shape == two.shape and np.abs(one - two).max() < 1e-2
    else:
        assert np.abs(np.asarray(mine) - np.asarray(other)).max() < LAST_BITS


def reused(report: EmbedReport) -> tuple[int, dict[str, int]]:
    return report.rows_reused, report.vectors_reused


@pytest.fixture(scope="module")
def passages() -> list[dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for passage in docstrings(900):
        found.setdefault(passage["title"] + " " + passage["text"], passage)
    return list(found.values())[:500]


@pytest.mark.slow
def test_a_changed_a_renamed_and_a_copied_file_cost_what_is_new_in_them(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    upload(
        bucket,
        {
            "a.jsonl": jsonl_bytes(passages[:200]),
            "b.parquet": parquet_bytes(passages[200:300]),
            "c.jsonl": jsonl_bytes(passages[300:330]),
        },
    )
    first = embed(settings_for(bucket, tiny_model)).report
    assert reused(first) == (0, {})
    assert first.tokens_encoded == first.tokens
    changed = [{**p, "text": p["text"] + " anew"} if n == 77 else p for n, p in enumerate(passages[:200])]
    new = [*passages[400:402], *changed[:150], *changed[153:]]  # shifted by an insertion, three are gone
    upload(bucket, {"a.jsonl": jsonl_bytes(new), "d/b.parquet": parquet_bytes(passages[200:300])})
    upload(bucket, {"copy.jsonl": jsonl_bytes(passages[300:330])})
    STORAGE.delete([f"{bucket}/corpus/b.parquet"])
    result = embed(settings_for(bucket, tiny_model, "output.max_removed_fraction=0"))
    report = result.report
    assert report.rows_in == 199 + 100 + 30
    assert reused(report) == (report.rows_in - 3, {"object": report.rows_in - 3})
    assert report.objects_removed == 0, "a file that was renamed is not gone"
    assert 0 < report.tokens_encoded < 0.05 * first.tokens
    assert report.tokens == report.tokens_encoded + report.tokens_reused
    there = {row["passage_id"] for row in rows_of(bucket)}
    assert there == {p["id"] for p in [*new, *passages[200:330]]}
    check_as_if_clean(bucket, tiny_model)
    check_nothing_left_over(f"{bucket}/out")


@pytest.mark.slow
def test_vectors_are_taken_over_bit_by_bit(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    upload(bucket, {"a.jsonl": jsonl_bytes(passages[:100])})
    embed(settings_for(bucket, tiny_model))
    before = {row["passage_id"]: row for row in rows_of(bucket)}
    upload(bucket, {"a.jsonl": jsonl_bytes([*passages[50:100], *passages[:50]])})
    report = embed(settings_for(bucket, tiny_model)).report
    assert (report.tokens_encoded, report.rows_reused) == (0, 100)
    assert {row["passage_id"]: row for row in rows_of(bucket)} == before


@pytest.mark.slow
def test_texts_that_repeat_in_a_unit_are_encoded_once(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    rows = [{**passages[n % 10], "id": str(n)} for n in range(60)]
    bad = [{"id": "empty", "title": "", "text": ""}]
    upload(bucket, {"a.jsonl": jsonl_bytes(rows[:30] + bad + rows[30:])})
    overrides = ["corpus.max_rejected_fraction=0.5", "batching.unit_rows=100", "corpus.keep_columns=[title]"]
    report = embed(settings_for(bucket, tiny_model, *overrides)).report
    assert reused(report) == (50, {"repeated": 50})
    assert (report.rows_in, report.rows_out, report.rows_rejected) == (61, 60, 1)
    assert report.tokens_encoded * 6 == report.tokens
    check_as_if_clean(bucket, tiny_model, *overrides)


@pytest.mark.slow
def test_chunks_are_reused_wherever_they_stand_in_their_text(bucket: str, tiny_model: Path) -> None:
    sentence = "the quick brown fox number {} jumps over the lazy dog."
    lines = [sentence.format(n) for n in range(60)]
    keys = ["chunking.max_tokens=40", "chunking.keep_text=true", "corpus.title_column=null"]
    upload(bucket, {"a.jsonl": jsonl_bytes([{"id": "x", "text": "\n\n".join(lines)}])})
    first = embed(settings_for(bucket, tiny_model, *keys)).report
    texts = ["\n\n".join([*lines[:40], "Something else.", *lines[40:]]), lines[3]]
    upload(bucket, {"a.jsonl": jsonl_bytes([{"id": n, "text": t} for n, t in zip("xy", texts, strict=True)])})
    report = embed(settings_for(bucket, tiny_model, *keys)).report
    assert report.vectors_reused["object"] > 10
    assert 0 < report.tokens_encoded < 0.5 * first.tokens
    check_as_if_clean(bucket, tiny_model, *keys)


@pytest.mark.slow
@pytest.mark.slow
def test_a_chunk_says_of_its_own_passage_that_the_title_was_cut(bucket: str, tiny_model: Path) -> None:
    words = "the quick brown fox jumps over lazy dog"
    second = "A corpus becomes an index."
    long = {"id": "long", "title": " ".join([words] * 4), "text": f"The quick fox. {second}"}
    short = {"id": "short", "title": "", "text": second}
    upload(bucket, {"a.jsonl": jsonl_bytes([long])})
    keys = ["chunking.max_tokens=20"]
    embed(settings_for(bucket, tiny_model, *keys))
    upload(bucket, {"a.jsonl": jsonl_bytes([long, short])})
    report = embed(settings_for(bucket, tiny_model, *keys)).report
    assert (report.tokens_encoded, report.rows_reused) == (0, 2)
    assert [(row["passage_id"], row["truncated"]) for row in rows_of(bucket)] == [
        ("long", True),
        ("long", True),
        ("short", False),
    ]
    check_as_if_clean(bucket, tiny_model, *keys)


@pytest.mark.slow
def test_a_damaged_shard_gives_nothing(bucket: str, tiny_model: Path, passages: list[dict[str, str]]) -> None:
    upload(bucket, {"a.jsonl": jsonl_bytes(passages[:120])})
    embed(settings_for(bucket, tiny_model))
    damaged, good = [m.embeddings for m in read_manifest(f"{bucket}/out").shards]
    uri = f"{bucket}/out/{damaged.path}"
    data = bytearray(STORAGE.read(uri))
    place = len(data) // 2
    data[place] ^= 0x40  # of the same size
    STORAGE.write(uri, bytes(data))
    upload(bucket, {"a.jsonl": jsonl_bytes(passages[:119])})
    report = embed(settings_for(bucket, tiny_model)).report
    assert report.vectors_reused == {"object": good.rows - 1}
    assert report.rows_out == 119
    check_as_if_clean(bucket, tiny_model)


@pytest.mark.slow
def test_off_reuses_nothing_and_a_run_goes_on_with_another_setting(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    upload(bucket, {"a.jsonl": jsonl_bytes(passages[:120])})
    embed(settings_for(bucket, tiny_model))
    upload(bucket, {"a.jsonl": jsonl_bytes(passages[1:121])})
    off = settings_for(bucket, tiny_model, "output.reuse=off")
    assert all(not span.sources for task in prepare(off).todo for span in task.spans)
    assert reused(embed(off).report) == (0, {})
    # Half of the units are done with one setting, and the others with another.
    upload(bucket, {"a.jsonl": jsonl_bytes(passages[2:122])})
    embed(settings_for(bucket, tiny_model))
    manifest = read_manifest(f"{bucket}/out")
    STORAGE.delete([f"{bucket}/out/{manifest.shards[0].embeddings.path}"])
    again = embed(settings_for(bucket, tiny_model, "output.reuse=off"))
    assert again.report.units_done == 1
    check_as_if_clean(bucket, tiny_model)


@pytest.mark.slow
@pytest.mark.slow
def test_a_column_that_comes_or_goes_embeds_nothing_and_keeps_every_id(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    rows = [{**p, "n": n, "lang": "en"} for n, p in enumerate(passages[:90])]
    data = jsonl_bytes(rows)  # type: ignore[arg-type]
    for day in (1, 2):
        upload(bucket, {f"day={day}/a.jsonl": data})
    embed(settings_for(bucket, tiny_model, "corpus.keep_columns=[lang]"))
    before = read_shards(f"{bucket}/out")
    wanted = "corpus.keep_columns=[n,day,lang]"
    report = embed(settings_for(bucket, tiny_model, wanted)).report
    assert (report.tokens_encoded, report.rows_reused) == (0, 180)
    after = read_shards(f"{bucket}/out")
    assert after["n"].to_pylist() == list(range(90)) * 2
    assert after["day"].to_pylist() == ["1"] * 90 + ["2"] * 90
    assert after.select(before.schema.names).equals(before)
    assert embed(settings_for(bucket, tiny_model, wanted)).report.outcome == "nothing to do"
    bare = settings_for(bucket, tiny_model)
    report = embed(bare).report
    assert (report.tokens_encoded, report.rows_reused) == (0, 180)
    assert read_shards(f"{bucket}/out").equals(before.drop_columns(["lang"]))
    # A run that dies between dataset.json and the manifest leaves new columns over old shards.
    dataset = Dataset(STORAGE, f"{bucket}/out")
    dataset.change_rows(prepare(settings_for(bucket, tiny_model, wanted)).spec)
    assert embed(bare).report.units_done == 0
    assert dataset.read_spec().columns.kept == {}
    check_nothing_left_over(f"{bucket}/out")


@pytest.mark.slow
def test_a_dry_run_counts_what_has_vectors(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    upload(bucket, {"a.jsonl": jsonl_bytes(passages[:60]), "b.jsonl": jsonl_bytes(passages[60:120])})
    embed(settings_for(bucket, tiny_model))
    upload(bucket, {"a.jsonl": jsonl_bytes([*passages[:45], *passages[200:215]])})
    told = plan_only(settings_for(bucket, tiny_model))
    assert (told.rows_todo, told.reused) == (60, Share(60, 45))
    assert "45 of 60 rows looked at" in "\n".join(told.lines())
    report = embed(settings_for(bucket, tiny_model)).report
    assert report.rows_reused == 45
    assert told.tokens == pytest.approx(report.tokens_encoded, rel=0.5)


@pytest.mark.slow
def test_all_outputs_of_a_row_are_reused_together(
    bucket: str, tmp_path: Path, passages: list[dict[str, str]]
) -> None:
    model = make_m3(tmp_path / "m3", colbert_dim=24, positions=128, pickled=True)
    keys = ["model.outputs=[embedding,sparse,colbert]", "batching.unit_rows=30"]
    upload(bucket, {"a.jsonl": jsonl_bytes(passages[:40])})
    first = embed(settings_for(bucket, model, *keys)).report
    repeated = [
        {**passages[0], "id": "again"},
        {**passages[50], "id": "new"},
        {**passages[50], "id": "twice"},
    ]
    upload(bucket, {"a.jsonl": jsonl_bytes([*repeated, *passages[:40]])})
    report = embed(settings_for(bucket, model, *keys)).report
    assert reused(report) == (42, {"object": 41, "repeated": 1})
    assert report.tokens_encoded < 0.1 * first.tokens
    check_as_if_clean(bucket, model, *keys)


@pytest.mark.slow
@pytest.mark.slow
def test_of_a_corpus_of_which_60_percent_repeat_every_text_is_encoded_once(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    """Across units, files and groups of small files; a second night finds texts in all of the data set."""
    key, rng = "output.reuse=corpus", random.Random(0)
    rows = [*passages[:120], *rng.choices(passages[:120], k=180)]
    rng.shuffle(rows)
    rows = [{**row, "id": f"{n} {row['id']}"} for n, row in enumerate(rows)]
    small = {f"s{k}.jsonl": jsonl_bytes(rows[260 + 10 * k : 270 + 10 * k]) for k in range(4)}
    upload(bucket, {"a.jsonl": jsonl_bytes(rows[:140]), "b.parquet": parquet_bytes(rows[140:260]), **small})
    report = embed(settings_for(bucket, tiny_model, key, "batching.unit_rows=30")).report
    assert reused(report) == (180, {"repeated": 180})
    texts = {row["text_hash"]: row["n_tokens"] for row in rows_of(bucket)}
    assert (len(texts), report.tokens_encoded) == (120, sum(texts.values()))
    assert report.tokens == report.tokens_encoded + report.tokens_reused
    scattered = [{**row, "id": f"again {n}"} for n, row in enumerate([*passages[:120:4], *passages[300:305]])]
    upload(bucket, {"new/c.jsonl": jsonl_bytes(scattered), "new/d.parquet": parquet_bytes(scattered[-8:])})
    night = embed(settings_for(bucket, tiny_model, key, "batching.unit_rows=30")).report
    assert night.vectors_reused == {"corpus": 30 + 3, "repeated": 5}
    assert night.tokens == night.tokens_encoded + night.tokens_reused
    found = rows_of(bucket)
    assert sorted(row["passage_id"] for row in found) == sorted(
        row["id"] for row in [*rows, *scattered, *scattered[-8:]]
    )
    vectors: dict[object, object] = {}
    assert all(vectors.setdefault(row["text_hash"], row["embedding"]) == row["embedding"] for row in found)
    check_nothing_left_over(f"{bucket}/out")
    assert STORAGE.list_files(f"{bucket}/out/work") == []


@pytest.mark.slow
def test_who_reads_while_a_run_publishes_reads_to_the_end(
    bucket: str, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    """Old shards stay for output.grace_s: of readers that opened before, while and after, none fails."""
    upload(bucket, {"a.jsonl": jsonl_bytes(passages[:120])})
    kept = settings_for(bucket, tiny_model, "output.grace_s=3600")
    embed(kept)
    old = open_reader(f"{bucket}/out")
    ended, counts, failed = threading.Event(), [], []

    def read_on() -> None:
        while not ended.is_set():
            try:
                counts.append(sum(len(batch) for batch in open_reader(f"{bucket}/out").batches()))
            except BgeRayError as error:
                failed.append(error)

    reader = threading.Thread(target=read_on)
    reader.start()
    upload(bucket, {"a.jsonl": jsonl_bytes([*passages[5:120], *passages[200:220]])})
    try:
        embed(kept)
    finally:
        ended.set()
        reader.join()
    assert not failed
    assert set(counts) <= {120, 135} and 120 in counts
    assert sum(len(batch) for batch in open_reader(f"{bucket}/out").batches()) == 135
    assert {n for batch in old.batches() for n in batch.passage_ids.to_pylist()} == {
        p["id"] for p in passages[:120]
    }
    embed(settings_for(bucket, tiny_model, "output.grace_s=0"))
    with pytest.raises(StorageError, match=r"embeddings/.*parquet"):
        list(old.batches())
