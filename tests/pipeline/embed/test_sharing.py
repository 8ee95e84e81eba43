"""Texts that stand in several places are encoded once, in one process and without Ray."""

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bge_ray.dataset.shared import HASH_SECTIONS, WORK, read_entries
from bge_ray.model.feed.chunks import Chunker
from bge_ray.model.spec import resolve_encoder, text_feeder
from bge_ray.pipeline.embed import job, sharing
from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.embed.prepare import settle_chunking
from bge_ray.records.reports import EmbedReport
from bge_ray.records.schemas import hash_texts
from bge_ray.settings.sections import ChunkingSettings, ModelSettings, Settings, parse_settings
from bge_ray.storage.objects import Storage, join
from tests.model.run.test_late_chunks import by_transformers
from tests.storage.doubles import Died, Hooked
from tests.support.alone import without_ray
from tests.support.corpora import docstrings, jsonl_bytes, parquet_bytes
from tests.support.datasets import check_nothing_left_over, read_manifest, read_shards
from tests.support.ledgers import Handle
from tests.support.models import make_m3

pytestmark = pytest.mark.long

STORAGE = Storage(5)
LAST_BITS = 1e-5
WRITES = ("write", "create", "replace")


@pytest.fixture(scope="module")
def passages() -> list[dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for passage in docstrings(700):
        found.setdefault(passage["title"] + " " + passage["text"], passage)
    return list(found.values())[:400]


def settings_for(root: Path, model: Path, *overrides: str, out: str = "out") -> Settings:
    keys = {
        "corpus.uri": root / "corpus",
        "output.uri": root / out,
        "model.name": model,
        "batching.unit_rows": 20,
        "output.grace_s": 0,
        "output.reuse": "corpus",
    }
    return parse_settings(None, [f"{k}={v}" for k, v in keys.items()] + list(overrides))


def upload(root: Path, files: dict[str, list[dict[str, str]]]) -> None:
    for name, rows in files.items():
        data = parquet_bytes(rows) if name.endswith("parquet") else jsonl_bytes(rows)
        STORAGE.write(str(root / "corpus" / name), data)


def run(settings: Settings) -> EmbedReport:
    with without_ray():
        return embed(settings).report


def repeating(passages: list[dict[str, str]], n_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Return rows of which 60 % repeat the text of others."""
    distinct = passages[: n_rows * 2 // 5]
    rng = random.Random(seed)
    rows = [*distinct, *rng.choices(distinct, k=n_rows - len(distinct))]
    rng.shuffle(rows)
    return [{**row, "id": f"{n} {row['id']}"} for n, row in enumerate(rows)]


def as_files(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Spread rows: a large file of several units, one of another format, and small ones that make a group."""
    n = len(rows) // 10
    cut = {"a.jsonl": rows[: 5 * n], "b.parquet": rows[5 * n : 8 * n]}
    small = rows[8 * n :]
    return cut | {f"s{k}.jsonl": small[k * len(small) // 4 : (k + 1) * len(small) // 4] for k in range(4)}


def rows_of(root: Path, out: str) -> list[dict[str, Any]]:
    rows = read_shards(str(root / out)).to_pylist()
    return sorted(rows, key=lambda row: (row["passage_id"], row.get("chunk_no", 0)))


def check_as_if_clean(root: Path, model: Path, *overrides: str) -> None:
    """The data set has the rows of one that reuses nothing; vectors to their last bits."""
    run(settings_for(root, model, *overrides, "output.reuse=off", out="clean"))
    ours, clean = rows_of(root, "out"), rows_of(root, "clean")
    assert len(ours) == len(clean) > 0
    for mine, other in zip(ours, clean, strict=True):
        for name in mine.keys() - {"vector_id"}:
            if name == "embedding":
                assert np.abs(np.asarray(mine[name]) - np.asarray(other[name])).max() < LAST_BITS
            elif name not in ("sparse", "colbert"):
                assert mine[name] == other[name], name
    manifest = read_manifest(str(root / "out"))
    assert manifest.rows_in == manifest.rows_out + manifest.rows_rejected
    check_nothing_left_over(str(root / "out"))
    assert STORAGE.list_files(str(root / "out" / WORK)) == []


def tokens_of_distinct(root: Path, out: str = "out") -> int:
    return sum({row["text_hash"]: row["n_tokens"] for row in rows_of(root, out)}.values())


@pytest.mark.parametrize(
    "overrides",
    [(), pytest.param(("chunking.max_tokens=40", "chunking.titles=every"), marks=pytest.mark.slow)],
)
def test_of_a_corpus_that_repeats_every_text_is_encoded_once(
    tmp_path: Path, tiny_model: Path, passages: list[dict[str, str]], overrides: tuple[str, ...]
) -> None:
    upload(tmp_path, as_files(repeating(passages, 200)))
    report = run(settings_for(tmp_path, tiny_model, *overrides))
    assert report.tokens_encoded == tokens_of_distinct(tmp_path)
    assert report.tokens == report.tokens_encoded + report.tokens_reused
    assert report.tokens_encoded < 0.5 * report.tokens
    assert set(report.vectors_reused) == {"repeated"}
    if not overrides:
        assert report.rows_reused == report.vectors_reused["repeated"] == 120
    check_as_if_clean(tmp_path, tiny_model, *overrides)


@pytest.mark.slow
def test_texts_are_found_anywhere_in_the_data_set(
    tmp_path: Path, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    upload(tmp_path, {"a.jsonl": passages[:100], "b.parquet": passages[100:160]})
    first = run(settings_for(tmp_path, tiny_model))
    assert (first.rows_reused, first.tokens_encoded) == (0, first.tokens)
    # One changed file, and two new ones of other sizes and names, of texts from all over.
    scattered = [{**row, "id": f"again {row['id']}"} for row in passages[:160:3]]
    upload(
        tmp_path,
        {
            "b.parquet": [*passages[100:130], *passages[200:204]],
            "new/c.jsonl": [*scattered, *passages[204:210]],
            "new/d.jsonl": [*scattered[:7], *({**row, "id": f"d {row['id']}"} for row in passages[202:212])],
        },
    )
    report = run(settings_for(tmp_path, tiny_model))
    assert report.vectors_reused == {"object": 30, "corpus": len(scattered) + 7, "repeated": 8}
    assert report.rows_reused == 30 + len(scattered) + 7 + 8
    assert report.rows_in - report.rows_reused == len(passages[200:212])
    assert report.tokens == report.tokens_encoded + report.tokens_reused
    check_as_if_clean(tmp_path, tiny_model)
    assert run(settings_for(tmp_path, tiny_model)).outcome == "nothing to do"


def test_reused_vectors_are_those_that_are_there_bit_by_bit(
    tmp_path: Path, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    upload(tmp_path, {"a.jsonl": passages[:50]})
    run(settings_for(tmp_path, tiny_model))
    before = {row["passage_id"]: row["embedding"] for row in rows_of(tmp_path, "out")}
    upload(tmp_path, {"b.jsonl": [{**row, "id": f"b {row['id']}"} for row in passages[10:30]]})
    report = run(settings_for(tmp_path, tiny_model))
    assert (report.tokens_encoded, report.vectors_reused) == (0, {"corpus": 20})
    after = {row["passage_id"]: row["embedding"] for row in rows_of(tmp_path, "out")}
    assert all(after[f"b {row['id']}"] == before[row["id"]] for row in passages[10:30])


def test_all_outputs_of_a_text_are_given_together(tmp_path: Path, passages: list[dict[str, str]]) -> None:
    model = make_m3(tmp_path / "m3", colbert_dim=24, positions=128)
    keys = ["model.outputs=[embedding,sparse,colbert]"]
    upload(tmp_path, as_files(repeating(passages, 60)))
    report = run(settings_for(tmp_path, model, *keys))
    assert report.tokens_encoded == tokens_of_distinct(tmp_path)
    rows = {}
    for row in rows_of(tmp_path, "out"):
        outputs = (row["embedding"], row["sparse"], row["colbert"])
        assert rows.setdefault(row["text_hash"], outputs) == outputs
        assert len(row["colbert"]) == row["n_tokens"] - 1
    check_as_if_clean(tmp_path, model, *keys)


@pytest.mark.parametrize("kind", ["shard", "given", "gone"])
def test_what_is_damaged_gives_nothing_and_its_texts_are_encoded(
    tmp_path: Path, tiny_model: Path, passages: list[dict[str, str]], kind: str
) -> None:
    """A published shard, or a file of the run itself, right before it is read."""
    upload(tmp_path, {"a.jsonl": passages[:20], "b.jsonl": passages[20:40]})
    run(settings_for(tmp_path, tiny_model))
    damaged = next(m.embeddings for m in read_manifest(str(tmp_path / "out")).shards if m.embeddings)
    both = [{**row, "id": f"again {row['id']}"} for row in passages[:40]]
    upload(tmp_path, {"c.jsonl": both[:30], "d.jsonl": both[25:] + passages[40:45]})
    done = []

    def strike(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 8
        path.write_bytes(bytes(data))
        done.append(path)

    if kind == "shard":
        strike(tmp_path / "out" / damaged.path)
        (tmp_path / "corpus" / "a.jsonl").unlink()  # its shards go, and may give until then

    def before(storage: Hooked) -> None:
        given = sorted((tmp_path / "out" / WORK).glob("*/given/*"))
        if kind != "shard" and not done and len(given) == 2 and "/given/" not in storage.counted[-1]:
            if kind == "given":
                strike(given[0])
            else:
                given[0].unlink()
                done.append(given[0])

    def hooked(timeout_s: float) -> Hooked:
        storage = Hooked(timeout_s)
        return dataclasses.replace(storage, before=lambda _: before(storage), counted=storage.counted)

    with without_ray(hooked):
        report = embed(settings_for(tmp_path, tiny_model)).report
    assert done
    assert 0 < report.vectors_reused["corpus"] <= 25
    assert report.rows_out == 30 + 20
    check_as_if_clean(tmp_path, tiny_model)


@pytest.mark.slow
def test_killed_before_any_write_a_run_ends_with_the_bytes_of_one_that_was_not(
    tmp_path: Path, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    """Each time the process dies twice, and the third run ends, on a CPU with the same bytes."""
    files = as_files(repeating(passages, 80))
    upload(tmp_path, {"a.jsonl": files["a.jsonl"]})
    run(settings_for(tmp_path, tiny_model, out="first"))
    upload(tmp_path, files)
    counting = Hooked(5)
    shutil.copytree(tmp_path / "first", tmp_path / "out")
    with without_ray(lambda _: counting):
        embed(settings_for(tmp_path, tiny_model))
    whole = read_manifest(str(tmp_path / "out"))
    check_as_if_clean(tmp_path, tiny_model)
    writes = [n for n, what in enumerate(counting.counted) if what.split()[0] in WRITES]
    work = [n for n in writes if f"/{WORK}/" in counting.counted[n]]
    assert len(work) > 5, "hashes, who gives what, what is given"
    rng = random.Random(3)
    for trial, moment in enumerate([*work, *rng.sample(writes, 6)]):
        out = f"killed-{trial}"
        shutil.copytree(tmp_path / "first", tmp_path / out)
        for last in (moment, moment // 2 + rng.randrange(5)):

            def die(number: int, last: int = last) -> None:
                if number >= last:
                    raise Died

            with without_ray(lambda _: Hooked(5, die)), pytest.raises(Died):
                embed(settings_for(tmp_path, tiny_model, out=out))
        run(settings_for(tmp_path, tiny_model, out=out))
        assert read_manifest(str(tmp_path / out)) == whole, counting.counted[moment]
        assert STORAGE.list_files(join(str(tmp_path / out), WORK)) == []


def test_a_corpus_that_changes_between_two_attempts_begins_anew_and_leaves_nothing(
    tmp_path: Path, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    upload(tmp_path, as_files(repeating(passages, 80)))

    def die(storage: Hooked) -> None:
        if len(list((tmp_path / "out").glob("done/*"))) == 2:
            raise Died

    def hooked(timeout_s: float) -> Hooked:
        storage = Hooked(timeout_s)
        return dataclasses.replace(storage, before=lambda _: die(storage))

    with without_ray(hooked), pytest.raises(Died):
        embed(settings_for(tmp_path, tiny_model))
    [begun] = (tmp_path / "out" / WORK).iterdir()
    assert list(begun.glob("given/*"))
    upload(tmp_path, {"c.jsonl": [{**row, "id": f"c {row['id']}"} for row in passages[:40]]})
    report = run(settings_for(tmp_path, tiny_model))
    assert report.units_done == report.units_planned > 2
    assert {row["passage_id"] for row in rows_of(tmp_path, "out")} > {
        f"c {row['id']}" for row in passages[:40]
    }
    check_as_if_clean(tmp_path, tiny_model)


def test_a_parcel_that_kills_its_process_shares_nothing_and_the_others_do(
    tmp_path: Path, tiny_model: Path, passages: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as Ray starts a task again, it gets further; one that dies for many parcels finds no texts."""
    upload(tmp_path, {f"{n}.jsonl": passages[20 * n : 20 * n + 20] for n in range(5)})
    asked: list[tuple[Any, ...]] = []

    def take(*_: object) -> sharing.Way:
        def note(does: str, task: Any, arguments: Any) -> list[Any]:
            asked.extend(arguments)
            raise Died

        return sharing.Way(note, lambda *_: None)

    with without_ray(), monkeypatch.context() as patched, pytest.raises(Died):
        patched.setattr(job, "by_ray", take)
        embed(settings_for(tmp_path, tiny_model))
    [(given, shared, tasks)] = asked
    cut = sharing.cut_parcel
    for lethal, left in (({2}, {0, 1, 3, 4}), ({0, 1, 2, 3}, set())):
        given = dataclasses.replace(given, ledger=Handle())
        shared = dataclasses.replace(shared, folder=f"work/{len(left)}")

        def die(found: Any, *rest: Any, lethal: set[int] = lethal) -> Any:
            if found.task.place in lethal:
                raise Died
            return cut(found, *rest)

        monkeypatch.setattr(sharing, "cut_parcel", die)
        with without_ray():
            for _ in range(sharing.MOST_DEATHS if not left else 2):
                with pytest.raises(Died):
                    sharing.hash_parcels_task(given, shared, tasks)
            counts = sharing.hash_parcels_task(given, shared, tasks)
            again = sharing.hash_parcels_task(given, shared, tasks)
        entries = read_entries(STORAGE, str(tmp_path / "out" / shared.hashes_path(0)), range(HASH_SECTIONS))
        assert counts == again == {0: len(entries)}
        assert set(entries["place"].tolist()) == left


def test_a_run_that_has_nothing_to_share_leaves_no_work(
    tmp_path: Path, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    upload(tmp_path, {"a.jsonl": passages[:30], "empty.jsonl": []})
    report = run(settings_for(tmp_path, tiny_model))
    assert (report.rows_out, report.vectors_reused) == (30, {})
    assert STORAGE.list_files(str(tmp_path / "out" / WORK)) == []


LATE = ("model.pooling=mean", "model.max_length=100", "chunking.max_tokens=30", "chunking.late=true")


def long_text(*changed: int) -> str:
    sentences = [f"the quick brown fox number {n} jumps over the lazy dog." for n in range(60)]
    for n in changed:  # with as many tokens
        sentences[n] = f"the quick brown fox number {n} jumps over the lazy fox."
    return " ".join(sentences)


def test_late_chunks_are_reused_where_their_whole_window_is_the_same(
    tmp_path: Path, tiny_model: Path
) -> None:
    rows = [{"id": "x", "title": "", "text": long_text()}, {"id": "y", "title": "", "text": long_text(59)}]
    upload(tmp_path, {"a.jsonl": rows[:1], "b.parquet": rows[1:]})
    first = run(settings_for(tmp_path, tiny_model, *LATE))
    chunks = [row for row in rows_of(tmp_path, "out") if row["passage_id"] == "x"]
    assert len(chunks) > 20
    # All but the last window of y are those of x, and each window is encoded once.
    assert 0 < len(chunks) - first.vectors_reused["repeated"] < 8
    upload(tmp_path, {"a.jsonl": [{**rows[0], "text": long_text(30)}]})
    again = run(settings_for(tmp_path, tiny_model, *LATE))
    assert again.rows_reused == 0
    new = [row for row in rows_of(tmp_path, "out") if row["passage_id"] == "x"]
    kept = {row["text_hash"] for row in chunks} & {row["text_hash"] for row in new}
    assert len(kept) == again.vectors_reused["object"]
    # Of the window that changed every chunk, and no other.
    touched = [n for n, row in enumerate(new) if row["text_hash"] not in kept]
    assert touched == list(range(touched[0], touched[-1] + 1)) and 2 <= len(touched) <= 8
    assert again.tokens_encoded <= 100
    check_as_if_clean(tmp_path, tiny_model, *LATE)
    # What comes in the middle moves the windows behind it, and none before.
    middle = len(long_text()) // 2
    longer = long_text(30)[:middle] + " And so does the lazy dog." + long_text(30)[middle:]
    upload(tmp_path, {"a.jsonl": [{**rows[0], "text": longer}]})
    moved = run(settings_for(tmp_path, tiny_model, *LATE))
    assert 0.3 * len(new) < moved.vectors_reused["object"] < 0.6 * len(new)
    check_as_if_clean(tmp_path, tiny_model, *LATE)


def test_late_chunks_of_a_data_set_are_those_of_transformers(
    tmp_path: Path, tiny_model: Path, passages: list[dict[str, str]]
) -> None:
    rows = [*passages[:6], {"id": "long", "title": "of a fox", "text": long_text(3, 40)}]
    upload(tmp_path, {"a.jsonl": rows})
    run(settings_for(tmp_path, tiny_model, *LATE))
    spec = resolve_encoder(ModelSettings(name=str(tiny_model), pooling="mean", max_length=100), on_gpu=False)
    chunking = settle_chunking(ChunkingSettings(max_tokens=30, late=True), spec)
    names = (
        Chunker(text_feeder(spec), chunking)
        .cut([row["title"] for row in rows], [row["text"] for row in rows])
        .read
    )
    found = read_shards(str(tmp_path / "out"))
    assert found["text_hash"].to_pylist() == hash_texts(names).to_pylist()
    vectors = np.stack(found["embedding"].to_numpy(zero_copy_only=False))
    np.testing.assert_allclose(vectors, by_transformers(tiny_model, names), atol=1e-5)
