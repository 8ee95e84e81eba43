"""What a run promises of the folder that it writes: whose files stay, what a report says, who may write."""

import dataclasses
import datetime
import io
import json
import re
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bge_ray.dataset.changes import manifest_digest, read_changes
from bge_ray.dataset.folder import Dataset
from bge_ray.errors import (
    BgeRayError,
    CorpusError,
    DatasetMismatchError,
    OutputBusyError,
    OutputCollisionError,
    RejectedRowsError,
)
from bge_ray.pipeline.embed.job import EmbedWork, embed, plan_only
from bge_ray.pipeline.embed.prepare import prepare
from bge_ray.pipeline.engine.receipts import wait_for_paths
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.pipeline.work import carry_out
from bge_ray.records.reports import EmbedReport, read_report
from bge_ray.records.schemas import hash_texts
from bge_ray.report.facts import RunFacts
from bge_ray.settings.sections import Settings, parse_settings
from bge_ray.storage.lease import Lease
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.sweep import RETIRED
from tests.storage.doubles import Died, Hooked
from tests.support.corpora import jsonl_bytes
from tests.support.datasets import check_nothing_left_over, read_manifest, read_shards, vectors_by_id
from tests.support.slow import slow

if TYPE_CHECKING:
    import datasets

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

STORAGE = Storage(20)
NOBODY = {"run_id": "another", "process_started": 0.0}


def rows(first: int, count: int = 6) -> bytes:
    return jsonl_bytes([{"id": f"{i}", "text": f"passage number {i}"} for i in range(first, first + count)])


def settings_for(root: str, model: Path, *overrides: str) -> Settings:
    keys = {
        "corpus.uri": f"{root}/corpus",
        "output.uri": f"{root}/out",
        "model.name": model,
        "batching.unit_rows": 3,
        "resources.num_encoders": 1,
        "output.storage_timeout_s": 20,
        "output.grace_s": 0,
        "output.max_removed_fraction": 1,
    }
    return parse_settings(None, [f"{k}={v}" for k, v in keys.items()] + list(overrides))


def put(root: str, **objects: bytes) -> None:
    for name, data in objects.items():
        STORAGE.write(join(root, "corpus", f"{name}.jsonl"), data)


def remove(root: str, name: str) -> None:
    STORAGE.delete([join(root, "corpus", f"{name}.jsonl")])


def contents(root: str) -> dict[str, bytes]:
    """Return every visible file of the output by its path below it."""
    below = f"{root}/out/"
    return {
        info.uri.removeprefix("file://").partition(below)[2]: STORAGE.read(info.uri)
        for info in STORAGE.list_files(f"{root}/out")
    }


def report_of(out: str) -> EmbedReport | None:
    return read_report(EmbedReport, STORAGE.read_optional(join(out, "report.json")))


def check_report(out: str) -> None:
    """No report that says "complete" stands beside a manifest of another run."""
    report, manifest = report_of(out), Dataset(STORAGE, out).read_manifest()
    if report is not None and report.complete:
        assert manifest is not None
        assert report.key == manifest_digest(manifest)


def leave_lease(out: str) -> None:
    """Leave the lease of a run of this machine that is no more."""
    with Lease(STORAGE, out):
        holder = json.loads(STORAGE.read(join(out, "lease.json"))) | NOBODY
    STORAGE.write(join(out, "lease.json"), json.dumps(holder).encode())


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


# --- whose files -----------------------------------------------------------------------------------

THEIRS = parquet(pa.table({"vector_id": [1, 2], "text": ["not", "ours"]}))
FOREIGN = {
    "thesis.tex": b"theirs",
    "README.md": b"# theirs",
    "embeddings/theirs.parquet": THEIRS,
    "embeddings/00000000-0000000000.parquet": THEIRS,  # where the first shard would go
    "embeddings/00000077-0000000000.parquet": b"no Parquet at all",
    "embeddings/copy/00000077-0000000000.parquet": THEIRS,
    "rejected/00000000-0000000003.parquet": THEIRS,
    "rejected/notes": b"theirs",
    "done/notes.json": b"theirs",
    "done/copy/00000000-0000000000.json": b"theirs",
    "plan/notes.json": b"theirs",
    "plan/copy/000099.json": b"theirs",
    "changes/notes.json": b"theirs",
    "index/theirs.faiss": b"theirs",
    "work/parts/theirs": b"theirs",
    "reranked/run.parquet": THEIRS,
}


def plant(out: str) -> None:
    for name, data in FOREIGN.items():
        STORAGE.write(join(out, name), data)


@pytest.mark.slow  # four jobs; the campaign lays more files, under every kind of run
@pytest.mark.parametrize("root", ["s3", "file"], indirect=True)
def test_files_of_others_survive_every_kind_of_run(root: str, tiny_model: Path) -> None:
    out, settings = f"{root}/out", settings_for(root, tiny_model)
    put(root, a=rows(0), b=rows(10))
    plant(out)

    def theirs() -> dict[str, bytes]:
        return {name: data for name, data in contents(root).items() if name in FOREIGN}

    assert embed(settings).report.rows_out == 12
    assert theirs() == FOREIGN
    assert embed(settings).report.outcome == "nothing to do"
    assert theirs() == FOREIGN

    remove(root, "a")
    put(root, b=rows(20))
    before = set(contents(root))
    assert embed(settings).report.rows_in == 6
    assert theirs() == FOREIGN
    gone = before - set(contents(root))
    assert len([name for name in gone if name.startswith("embeddings/")]) == 4, "ours go"

    leave_lease(out)
    assert embed(settings).report.outcome == "nothing to do"
    assert theirs() == FOREIGN
    remove(root, "b")
    put(root, c=rows(30))
    leave_lease(out)
    assert embed(settings).report.rows_in == 6
    assert theirs() == FOREIGN
    assert set(vectors_by_id(out)) == {str(i) for i in range(30, 36)}


@pytest.mark.parametrize("name", ["report.json", "report.html", "dataset.json", "manifest.json"])
def test_a_foreign_file_at_a_fixed_name_is_named_and_nothing_is_written(
    name: str, tmp_path: Path, tiny_model: Path
) -> None:
    root = str(tmp_path)
    put(root, a=rows(0))
    STORAGE.write(f"{root}/out/{name}", b'{"theirs": 1}')
    with pytest.raises(BgeRayError, match=name):
        embed(settings_for(root, tiny_model))
    left = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert left == {name}
    assert (tmp_path / "out" / name).read_bytes() == b'{"theirs": 1}'


@pytest.mark.slow
def test_a_copy_below_a_folder_of_ours_stands_for_nothing(tmp_path: Path, tiny_model: Path) -> None:
    """Someone keeps a copy of a shard; the shard itself is lost, and made again."""
    root, settings = str(tmp_path), settings_for(str(tmp_path), tiny_model)
    put(root, a=rows(0))
    first = embed(settings).manifest
    shard = tmp_path / "out" / first.shards[0].embeddings.path
    (shard.parent / "copy").mkdir()
    shard.rename(shard.parent / "copy" / shard.name)
    again = embed(settings)
    assert again.report.rows_in == 3
    assert again.manifest == first
    read_shards(f"{root}/out")
    assert (shard.parent / "copy" / shard.name).exists()


@pytest.mark.slow
def test_no_empty_folder_is_left(tmp_path: Path, tiny_model: Path) -> None:
    root = str(tmp_path)
    settings = settings_for(root, tiny_model, "corpus.max_rejected_fraction=1")
    put(root, a=rows(0), b=b'{"id": "x", "text": ""}\n')
    embed(settings)
    assert (tmp_path / "out" / "rejected").is_dir()
    remove(root, "b")
    embed(settings)
    empty = [p for p in (tmp_path / "out").rglob("*") if p.is_dir() and not any(p.iterdir())]
    assert empty == []


# --- reports, and deaths ---------------------------------------------------------------------------


class Looks(StopRequest):
    """A stop request that looks at the output whenever it is asked."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self._look = look

    def check(self) -> None:
        self._look()
        super().check()


@pytest.mark.slow
def test_the_report_before_goes_before_anything_new_comes(tmp_path: Path, tiny_model: Path) -> None:
    root, out = str(tmp_path), f"{tmp_path}/out"
    put(root, a=rows(0))
    old = set(contents(root)) if embed(settings_for(root, tiny_model)) else set()
    put(root, b=rows(10, 30))
    seen = []

    def look() -> None:
        new = set(contents(root)) - old
        if any(name.startswith(("embeddings/", "done/")) for name in new):
            assert STORAGE.read_optional(join(out, "report.json")) is None
            assert STORAGE.read_optional(join(out, "report.html")) is None
            seen.append(len(new))

    embed(settings_for(root, tiny_model), stop=Looks(look))
    assert seen
    check_report(out)


@pytest.mark.slow
def test_a_run_that_died_or_failed_leaves_no_report_that_vouches(tmp_path: Path, tiny_model: Path) -> None:
    """A, then B cut off in the middle, then A; then B refused for its rows, then A."""
    root, out, settings = str(tmp_path), f"{tmp_path}/out", settings_for(str(tmp_path), tiny_model)
    put(root, a=rows(0))
    first = embed(settings).manifest

    def die() -> None:
        if STORAGE.list_files(join(out, "done")):
            raise Died

    put(root, b=rows(10, 30))
    with pytest.raises(Died):
        embed(settings, stop=Looks(die))
    wait_for_paths(20)
    assert report_of(out) is None
    assert read_manifest(out) == first, "a reader still has what A published"
    read_shards(out)
    remove(root, "b")
    again = embed(settings)
    assert again.report.outcome.startswith("complete")
    assert again.manifest == first
    check_nothing_left_over(out)

    put(root, b=rows(10) + b'{"id": "x", "text": ""}\n' * 9)
    with pytest.raises(RejectedRowsError):
        embed(settings)
    report = report_of(out)
    assert report is not None
    assert not report.complete
    assert "rejected" in report.outcome
    assert read_manifest(out) == first
    remove(root, "b")
    assert embed(settings).report.outcome.startswith("complete")
    check_report(out)
    check_nothing_left_over(out)
    assert embed(settings).report.outcome == "nothing to do"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_death_between_any_two_requests_is_mended_by_the_next_run(tmp_path: Path, tiny_model: Path) -> None:
    """An object goes, so there is all to do but to embed; the process dies before its n-th request."""
    root, out = str(tmp_path), f"{tmp_path}/out"
    settings = settings_for(root, tiny_model)
    put(root, a=rows(0), b=rows(10))
    embed(settings)
    theirs = {name: data for name, data in FOREIGN.items() if not Path(out, name).exists()}
    for name, data in theirs.items():
        STORAGE.write(join(out, name), data)
    remove(root, "b")
    shutil.copytree(out, tmp_path / "before")

    def run(storage: Storage) -> EmbedReport:
        planned = prepare(settings)
        planned = dataclasses.replace(planned, dataset=Dataset(storage, out))
        return carry_out(EmbedWork(settings, planned), RunFacts("embed"), None)

    number = 0
    while True:

        def die(n: int, at: int = number) -> None:
            if n >= at:
                raise Died

        try:
            run(Hooked(20, die))
        except Died:
            pass
        else:
            break
        check_report(out)
        read_shards(out)
        lease = Path(out, "lease.json")
        if lease.exists():
            lease.write_text(json.dumps(json.loads(lease.read_text()) | NOBODY))
        report = run(STORAGE)
        assert report.complete, number
        assert read_manifest(out).rows_in == 6
        check_report(out)
        assert {name: Path(out, name).read_bytes() for name in theirs} == theirs
        live = {m.embeddings.path for m in read_manifest(out).shards if m.embeddings}
        mine = {n for n in contents(root) if n.startswith(("embeddings/", "done/"))} - set(theirs)
        assert mine == live, number
        assert not lease.exists()
        assert run(STORAGE).outcome == "nothing to do"
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "before", out)
        number += 1
    assert number > 20


# --- who may write, and over what ------------------------------------------------------------------


def _change_a_digit(path: Path) -> None:
    text = path.read_text()
    changed = re.sub(r'("rows_out": |"tokens": )\d', lambda m: m[1] + str(9 - int(m[0][-1])), text, count=1)
    assert (changed != text, len(changed)) == (True, len(text))
    path.write_text(changed)


@pytest.mark.slow
def test_a_page_or_a_card_that_is_gone_is_made_again(tmp_path: Path, tiny_model: Path) -> None:
    settings = settings_for(str(tmp_path), tiny_model)
    put(str(tmp_path), a=rows(0))
    report, before = embed(settings).report, contents(str(tmp_path))
    assert [file.path for file in report.files] == ["manifest.json"]
    for name in ("report.html", "README.md"):
        (tmp_path / "out" / name).unlink()
        assert embed(settings).report.outcome == "nothing to do"
        after = contents(str(tmp_path))
        assert before.keys() == after.keys()
        assert len(after[name]) == len(before[name])
    (tmp_path / "out/README.md").write_bytes(b"# edited")
    assert embed(settings).report.outcome == "nothing to do"
    assert (tmp_path / "out/README.md").read_bytes() == b"# edited"


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        slow(("done/00000000-0000000000.json", lambda path: path.write_bytes(b'{"hello":"mine"}'))),
        ("manifest.json", _change_a_digit),
    ],
)
def test_what_no_rerun_mends_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_model: Path, name: str, spoil: Callable[[Path], object]
) -> None:
    root, settings = str(tmp_path), settings_for(str(tmp_path), tiny_model)
    put(root, a=rows(0))
    embed(settings)
    put(root, b=rows(6))
    path = tmp_path / "out" / name
    path.parent.mkdir(exist_ok=True)
    spoil(path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for job in (plan_only, embed):
        with pytest.raises(
            (DatasetMismatchError, OutputCollisionError), match=r"restore it|move it away"
        ) as it:
            job(settings)
        assert str(path) in str(it.value)
        assert "\n" not in str(it.value)
        assert it.value.exit_code == 2
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_an_output_that_another_run_holds_is_left_to_it(tmp_path: Path, tiny_model: Path) -> None:
    root, settings = str(tmp_path), settings_for(str(tmp_path), tiny_model)
    put(root, a=rows(0))
    with Lease(STORAGE, f"{root}/out", renew_s=0.2):
        with pytest.raises(OutputBusyError, match="is writing this output") as caught:
            embed(settings)
        assert set(contents(root)) == {"lease.json"}
    assert caught.value.exit_code == 75
    assert embed(settings).manifest.rows_out == 6


@pytest.mark.parametrize("out", ["corpus", "corpus/vectors", "corpus/../corpus/x"])
@pytest.mark.parametrize("job", [embed, plan_only])
def test_an_output_is_no_part_of_its_corpus(
    out: str, job: Callable[[Settings], object], tmp_path: Path, tiny_model: Path
) -> None:
    put(str(tmp_path), a=rows(0))
    with pytest.raises(OutputCollisionError, match=r"output\.uri") as caught:
        job(settings_for(str(tmp_path), tiny_model, f"output.uri={tmp_path}/{out}"))
    assert caught.value.exit_code == 2
    assert "corpus.uri" in str(caught.value)
    assert [p.name for p in (tmp_path / "corpus").rglob("*")] == ["a.jsonl"]


@pytest.mark.slow
def test_a_corpus_without_a_row_empties_no_data_set(tmp_path: Path, tiny_model: Path) -> None:
    """Whatever may be removed: its objects are there, and without a row they are a corpus that broke."""
    root = str(tmp_path)
    put(root, a=rows(0), b=rows(6))
    embed(settings_for(root, tiny_model))
    before = contents(root)
    put(root, a=b"", b=b"")
    said = (
        r"none of its 2 objects has a row, and the data set .*/out has 12, .* another output\.uri, or delete"
    )
    for job in (plan_only, embed):
        with pytest.raises(CorpusError, match=said) as caught:
            job(settings_for(root, tiny_model))
        assert caught.value.exit_code == 2
    assert contents(root) == before
    put(root, b=rows(6))
    assert embed(settings_for(root, tiny_model)).manifest.rows_out == 6


def test_a_data_set_of_the_first_format_is_refused_in_one_sentence(root: str, tiny_model: Path) -> None:
    put(root, a=rows(0))
    old = {
        "dataset.json": b'{"format_version": 1, "dim": 32, "dtype": "float32", "model": {"name": "x"}}',
        "manifest.json": b'{"fingerprint": "x", "rows_in": 1, "shards": []}',
        "plan/000001.json": b'{"objects": [], "next_object_no": 0}',
        "report.json": b'{"outcome": "complete"}',
    }
    for name, data in old.items():
        STORAGE.write(join(root, "out", name), data)
    with pytest.raises(DatasetMismatchError) as caught:
        embed(settings_for(root, tiny_model))
    said = str(caught.value)
    assert said.endswith("dataset.json: format 1, this version writes 2; choose another output.uri")
    assert caught.value.exit_code == 2
    assert contents(root) == old


@pytest.mark.slow
def test_a_model_that_makes_other_vectors_is_refused_with_both_values(
    tmp_path: Path, tiny_model: Path
) -> None:
    """The stored canaries are changed, as if another version of a library had made them."""
    root, settings = str(tmp_path), settings_for(str(tmp_path), tiny_model)
    put(root, a=rows(0))
    first = embed(settings).manifest
    path = tmp_path / "out" / "dataset.json"
    spec = json.loads(path.read_text())
    assert [c["dtype"] for c in spec["canaries"]] == ["float32"] * 3
    vector = spec["canaries"][0]["vector"]
    spec["canaries"][0]["vector"] = [-vector[0] - 0.1, *vector[1:]]
    Dataset(STORAGE, f"{root}/out").folder.put("dataset.json", json.dumps(spec).encode())
    put(root, b=rows(10))
    with pytest.raises(BgeRayError) as caught:
        embed(settings)
    for part in ("other vectors", "The quick brown fox", "cosine 0.", "at least 0.99999"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert read_manifest(f"{root}/out") == first
    read_shards(f"{root}/out")


# --- what readers get ------------------------------------------------------------------------------


def load(out: str, cache: Path) -> "datasets.Dataset":
    import datasets  # seconds, which the quick tests would pay for

    return datasets.load_dataset(out, split="train", cache_dir=str(cache))


@pytest.mark.slow
def test_readers_of_the_state_before_have_their_grace(tmp_path: Path, tiny_model: Path) -> None:
    root, out = str(tmp_path), f"{tmp_path}/out"
    put(root, a=rows(0), b=rows(10) + b'{"id": "bad", "text": ""}\n')
    lenient = "corpus.max_rejected_fraction=0.5"
    before = embed(settings_for(root, tiny_model, lenient)).manifest
    found = load(out, tmp_path / "hf1")
    assert set(found.column_names) == {
        "vector_id",
        "passage_id",
        "text_hash",
        "n_tokens",
        "truncated",
        "embedding",
    }
    assert sorted(found["passage_id"]) == sorted(vectors_by_id(out)), "and none that was rejected"
    vectors = dict(zip(found["passage_id"], found["embedding"], strict=True))
    assert all(np.array_equal(vectors[k], v) for k, v in vectors_by_id(out).items())

    put(root, b=rows(20))
    patient = settings_for(root, tiny_model, lenient, "output.grace_s=3600")
    after = embed(patient).manifest
    replaced = [f for m in before.shards for f in (m.embeddings, m.rejected) if f and m not in after.shards]
    assert len(replaced) == 3, "two units of vectors, and one of a rejected row alone"
    assert all((tmp_path / "out" / f.path).stat().st_size == f.bytes for f in replaced)
    assert set(json.loads((tmp_path / "out" / RETIRED).read_text())["since"]) == {f.path for f in replaced}
    assert sorted(load(out, tmp_path / "hf2")["passage_id"]) == sorted(vectors_by_id(out)), (
        "the live ones only"
    )
    assert embed(patient).report.outcome == "nothing to do"
    assert all((tmp_path / "out" / f.path).exists() for f in replaced)

    last = embed(settings_for(root, tiny_model, lenient))
    assert last.report.outcome == "nothing to do"
    assert last.manifest == after
    assert not (tmp_path / "out" / RETIRED).exists()
    check_nothing_left_over(out)
    assert sorted(load(out, tmp_path / "hf3")["passage_id"]) == sorted(vectors_by_id(out))


def test_hashes_and_kept_columns_come_through_whole(tmp_path: Path, tiny_model: Path) -> None:
    n = 10
    moment = datetime.datetime(2026, 11, 25, 12, 30, 0, 123456, tzinfo=datetime.UTC)
    kinds = {
        "tags": (pa.list_(pa.string()), [["a", None, "ü"][: i % 4] for i in range(n)]),
        "place": (
            pa.struct([("x", pa.int16()), ("y", pa.list_(pa.float32()))]),
            [{"x": i, "y": [0.5, i]} for i in range(n)],
        ),
        "price": (pa.decimal128(20, 4), [Decimal(f"{10**11 + i}.1234") for i in range(n)]),
        "when": (
            pa.timestamp("us", "Europe/Vienna"),
            [moment + datetime.timedelta(days=i) for i in range(n)],
        ),
        "raw": (pa.binary(), [bytes([0, 255, i]) for i in range(n)]),
    }
    columns = {
        name: pa.array([None if i == 4 else v for i, v in enumerate(values)], kind)
        for name, (kind, values) in kinds.items()
    }
    texts = [None if i == 2 else f"passage {i}" for i in range(n)]
    table = pa.table({"id": [f"p{i}" for i in range(n)], "text": texts, **columns})
    root = str(tmp_path)
    STORAGE.write(f"{root}/corpus/a.parquet", parquet(table))
    embed(
        settings_for(
            root,
            tiny_model,
            f"corpus.keep_columns=[{','.join(kinds)}]",
            "corpus.max_rejected_fraction=0.5",
            "model.passage_instruction='passage: '",
        )
    )
    found = read_shards(f"{root}/out")
    good = table.filter(pa.array([text is not None for text in texts]))
    for name, (kind, _) in kinds.items():
        assert found.schema.field(name).type == kind, name
        assert found[name].to_pylist() == good[name].to_pylist(), name
    hashes = hash_texts(f"passage: {text}" for text in good["text"].to_pylist())
    assert found["text_hash"].combine_chunks().to_pylist() == hashes.to_pylist()


@pytest.mark.slow
def test_changes_lead_from_each_manifest_to_the_next(tmp_path: Path, tiny_model: Path) -> None:
    root, out, settings = str(tmp_path), f"{tmp_path}/out", settings_for(str(tmp_path), tiny_model)
    states: list[tuple[str, set[int], set[str]]] = []

    def state() -> None:
        manifest = embed(settings).manifest
        ids = set(read_shards(out)["vector_id"].to_pylist())
        states.append((manifest_digest(manifest), ids, {m.embeddings.path for m in manifest.shards}))

    put(root, a=rows(0), b=rows(10))
    state()
    put(root, c=rows(20))
    state()
    remove(root, "a")
    put(root, b=rows(30))
    state()
    embed(settings)  # nothing to do is no change
    changes = read_changes(STORAGE, out)
    assert [c.number for c in changes] == [1, 2, 3]
    assert read_changes(STORAGE, out, since=2) == changes[2:]
    before: tuple[str | None, set[int], set[str]] = (None, set(), set())
    for change, after in zip(changes, states, strict=True):
        assert (change.before, change.after) == (before[0], after[0])
        assert set(change.added) == after[2] - before[2]
        assert set(change.removed) == before[2] - after[2]
        for ranges, ids in (
            (change.added_ids, after[1] - before[1]),
            (change.removed_ids, before[1] - after[1]),
        ):
            union = before[1] | after[1]
            assert {i for i in union if any(a <= i < b for a, b in ranges)} == ids
        before = after
