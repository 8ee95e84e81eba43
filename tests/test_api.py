"""The public API: a data set read back, questions answered in process, and a notebook left as it was."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch

import bge_ray
from bge_ray.dataset.commit import ShardWriter
from bge_ray.errors import IndexBuildError, ModelError, SettingsError, StorageError
from bge_ray.model.spec import resolve_encoder
from bge_ray.records.canonical import to_json
from bge_ray.records.columns import Columns, ColumnType
from bge_ray.records.dataset import DatasetSpec, FileFact
from bge_ray.records.ids import vector_ids
from bge_ray.records.index import SHARD_DIGITS
from bge_ray.records.plan import Unit
from bge_ray.records.schemas import REJECTED_SCHEMA, embedding_schema, hash_texts
from bge_ray.retrieval import Hit
from bge_ray.settings.sections import ModelSettings
from tests.report.samples import index_description
from tests.support.models import make_encoder
from tests.support.runs import REPOSITORY
from tests.support.searches import assert_same_ranking, brute_force, query_vectors
from tests.support.vectors import VectorDataset
from tests.support.warm import warm_environment

# A program of a user: its Ray, its context, handlers, levels and filters before and after, and the report.
NOTEBOOK = """
import json, logging, os, signal, sys, warnings
own_ray, corpus, out, model = sys.argv[1] == "own", *sys.argv[2:]
if own_ray:
    import ray
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
             _node_ip_address="127.0.0.1")
import bge_ray
if sys.argv[1] == "imported":
    import ray.data
import psutil

LOGGERS = ["ray", "ray.data", "ray.data._internal.progress", "bge_ray", ""]
def state():
    found = {
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "wakeup": None,
        "levels": {name: logging.getLogger(name).level for name in LOGGERS},
        "filters": [str(f) for f in warnings.filters],
        "handlers": len(logging.getLogger().handlers),
        "environment": dict(os.environ),
    }
    wakeup = signal.set_wakeup_fd(-1); signal.set_wakeup_fd(wakeup)
    found["wakeup"] = wakeup
    if own_ray:
        from ray.data import DataContext
        context = DataContext.get_current()
        found |= {"blocks": context.target_max_block_size, "bars": context.enable_progress_bars,
                  "ray": ray.get_runtime_context().gcs_address}
    return found
if own_ray or sys.argv[1] == "imported":
    import ray.data
def foreign():
    looked = set()
    for process in psutil.Process().children(recursive=True):
        try:
            looked |= {c.laddr.ip for c in process.net_connections("inet")
                       if c.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and c.laddr}
        except psutil.Error:
            continue
    return looked
import threading, time
addresses, tokens, over = set(), set(), threading.Event()
def look():
    while not over.is_set():
        addresses.update(foreign())
        tokens.add(os.environ.get("RAY_AUTH_TOKEN"))
        time.sleep(0.3)
threading.Thread(target=look, daemon=True).start()
before = state()
report = bge_ray.embed(
    {"corpus": {"uri": corpus, "keep_columns": ["url"]}, "output": {"uri": out}, "model": {"name": model}},
    resources__num_encoders=1, batching__unit_rows=40,
)
over.set()
after = state()
if own_ray:
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    assert [row["id"] for row in ray.data.range(3).take()] == [0, 1, 2]
print(json.dumps({
    "outcome": report.outcome, "rows": report.rows_out, "addresses": sorted(addresses),
    "token": bool(tokens - {None, before["environment"].get("RAY_AUTH_TOKEN")}),
    "changed": {k: [before[k], after[k]] for k in before if before[k] != after[k]},
    "processes": len(psutil.Process().children(recursive=True)),
}))
"""


def write_corpus(path: Path, rows: int) -> None:
    lines = [{"id": f"p{i}", "text": f"passage {i} about topic {i % 7}", "url": f"u{i}"} for i in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def notebook(way: str, folder: Path, model: Path, **environment: str) -> dict[str, object]:
    write_corpus(folder / "corpus.jsonl", 100)
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, way, folder / "corpus.jsonl", folder / "out", model],
        cwd="/",
        env=plain | warm_environment() | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_ray_that_the_user_started_is_as_it_was_afterwards(tmp_path: Path, tiny_model: Path) -> None:
    loopback = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "of-the-user",
    }
    told = notebook("own", tmp_path, tiny_model, **loopback)
    assert (told["outcome"], told["rows"]) == ("complete: 100 rows in 3 units", 100)
    assert told["changed"] == {}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("way", "environment"),
    [
        ("plain", {}),
        ("imported", {}),  # Ray reads most of its environment when it is imported
        ("plain", {"RAY_ADDRESS": ""}),
        ("plain", {"RAY_ADDRESS": "local"}),
    ],
)
def test_a_cluster_of_its_own_listens_on_loopback_with_a_token_of_its_own_and_goes(
    way: str, environment: dict[str, str], tmp_path: Path, tiny_model: Path
) -> None:
    told = notebook(way, tmp_path, tiny_model, **environment)
    assert (told["outcome"], told["rows"]) == ("complete: 100 rows in 3 units", 100)
    # Importing NumPy and Ray adds filters and levels of their own; "imported" shows that nothing else does.
    imports = {"levels", "filters"} if way == "plain" else set()
    assert set(told["changed"]) <= imports, told["changed"]  # type: ignore[call-overload]
    assert told["processes"] == 0
    assert told["token"]
    assert told["addresses"]
    assert set(told["addresses"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}  # type: ignore[call-overload]


def test_importing_the_package_loads_nothing_large() -> None:
    script = (
        "import sys, bge_ray\n"
        "heavy = {'ray', 'torch', 'numpy', 'pyarrow', 'pydantic', 'yaml', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert all(getattr(bge_ray, name) for name in bge_ray.__all__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_overrides_win_and_wrong_ones_are_refused_before_ray() -> None:
    from bge_ray.notebook import _settled
    from bge_ray.settings.sections import parse_settings

    given = {"corpus": {"uri": Path("/a")}, "model": None}
    settled = _settled(given, {"corpus__uri": "/b", "search__k": 7})
    assert (settled.corpus.uri, settled.search.k) == ("/b", 7)
    parsed = parse_settings(None, ["corpus.uri=/a$${X}"])
    assert _settled(parsed, {}) is parsed
    assert _settled(parsed, {"search__k": 7}).corpus.uri == "/a${X}"
    for overrides in ({"corpus__ury": "x"}, {"corpus": "x"}, {"search__k": "many"}):
        with pytest.raises(SettingsError):
            bge_ray.embed({"corpus": {"uri": "/a"}}, **overrides)
    # Other tests of this process may have servers; Ray none.
    assert not any("raylet" in child.name() for child in psutil.Process().children())


TEXTS = [f"passage {i} about topic {i % 7}" for i in range(60)]


def write_object(made: VectorDataset, number: int, ids: list[str], vectors: np.ndarray) -> None:
    """Write one shard with given passage ids, and one kept column."""
    schema = embedding_schema(made.spec.model.outputs, made.spec.columns.kept_schema())
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    columns = {
        "vector_id": vector_ids(number, np.arange(len(ids))),
        "passage_id": ids,
        "text_hash": hash_texts(ids),
        "n_tokens": np.full(len(ids), 5, np.int32),
        "truncated": np.zeros(len(ids), bool),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type),
        "url": [f"http://{name}" for name in ids],
    }
    table = pa.table([columns[name] for name in schema.names], schema=schema)
    writer = ShardWriter(made.dataset.storage, made.dataset.root, made.spec, "zstd")
    made.adopt(writer.commit(Unit(number, 0, len(ids)), f"f{number}", table, REJECTED_SCHEMA.empty_table()))


@pytest.fixture
def stored(tmp_path: Path, tiny_model: Path) -> tuple[str, np.ndarray]:
    """A data set of three objects, of which the last repeats passages of the first; and its vectors."""
    spec = resolve_encoder(ModelSettings(name=str(tiny_model), query_instruction="find: "), on_gpu=False)
    vectors = query_vectors(tiny_model, TEXTS)
    made = VectorDataset(str(tmp_path / "out"))
    made.dataset.storage.delete([f"{tmp_path}/out/dataset.json"])
    made.spec = DatasetSpec(spec, Columns("id", "text", None, {"url": ColumnType.of(pa.string())}))
    made.dataset.create_spec(made.spec)
    write_object(made, 0, [f"p{i}" for i in range(40)], vectors[:40])
    write_object(made, 1, [f"p{i}" for i in range(40, 60)], vectors[40:])
    write_object(made, 2, [f"p{i}" for i in range(10)], vectors[:10])
    made.publish()
    return str(tmp_path / "out"), vectors


def truth(queries: np.ndarray, vectors: np.ndarray, k: int) -> list[list[tuple[str, float]]]:
    return brute_force(queries, {f"p{i}": vector for i, vector in enumerate(vectors)}, k)


def check_hits(found: list[list[Hit]], expected: list[list[tuple[str, float]]]) -> None:
    assert len(found) == len(expected)
    for hits, wanted in zip(found, expected, strict=True):
        assert_same_ranking([(hit.passage_id, hit.score) for hit in hits], wanted)
        assert len({hit.passage_id for hit in hits}) == len(hits)


def test_a_data_set_is_read_in_batches_and_by_id(stored: tuple[str, np.ndarray]) -> None:
    root, vectors = stored
    dataset = bge_ray.open_dataset(root)
    assert (len(dataset), dataset.dim, dataset.columns) == (70, 32, ("url",))
    batches = list(dataset.batches())
    expected = np.concatenate([vectors, vectors[:10]])
    np.testing.assert_array_equal(np.concatenate([batch.vectors for batch in batches]), expected)
    ids = [name for batch in batches for name in batch.passage_ids.to_pylist()]
    assert ids == [f"p{i}" for i in [*range(60), *range(10)]]
    assert [url for batch in batches for url in batch.metadata["url"].to_pylist()] == [
        f"http://{i}" for i in ids
    ]

    found = dataset.lookup(["p45", "p3", "nobody", "p3"])
    assert found.passage_ids.to_pylist() == ["p3", "p45", "p3"]  # in order of place, and p3 is there twice
    np.testing.assert_array_equal(found.vectors, vectors[[3, 45, 3]])
    again = dataset.rows(found.vector_ids[::-1], columns=["n_tokens"])
    np.testing.assert_array_equal(again.vectors, found.vectors)
    assert again.metadata.column_names == ["n_tokens"]
    assert len(dataset.lookup([])) == len(dataset.rows([1 << 60])) == 0
    with pytest.raises(KeyError, match=r"has no column 'title'; it has .*url"):
        next(dataset.batches(["title"]))


def test_a_damaged_shard_is_refused(stored: tuple[str, np.ndarray]) -> None:
    root, _ = stored
    [path, *_] = sorted(Path(root, "embeddings").glob("*.parquet"))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="holds other bytes than were written"):
        list(bge_ray.open_dataset(root).batches())


def test_what_is_no_complete_data_set_is_refused(tmp_path: Path) -> None:
    for opening in (bge_ray.open_dataset, bge_ray.open_index):
        with pytest.raises(SettingsError, match="no complete data set there"):
            opening(str(tmp_path))


@pytest.mark.parametrize("kind", ["exact", "index"])
def test_questions_are_answered_in_this_process(
    stored: tuple[str, np.ndarray], tiny_model: Path, kind: str
) -> None:
    root, vectors = stored
    if kind == "index":
        write_index(root, np.concatenate([vectors, vectors[:10]]))
    index = bge_ray.open_index(root)
    assert (index.description is None) == (kind == "exact")
    assert index.dim == 32
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    questions = ["passage 3 about topic 3", "something else", "topic 5"]
    queries = query_vectors(tiny_model, questions, query_instruction="find: ")
    np.testing.assert_allclose(index.encode(questions), queries, atol=1e-6)
    for k in (1, 10, 60):
        expected = truth(queries, vectors, k)
        check_hits(index.search(questions, k), expected)
        check_hits(index.search(queries, k), expected)
        check_hits(index.search(queries, k, rescored=20), expected)
    assert [len(hits) for hits in index.search(questions, 100)] == [60] * 3  # passages, not vectors
    [[hit, *_]] = index.search(questions[0], 1, columns=["url"])
    assert hit.columns == {"url": f"http://{hit.passage_id}"}
    assert index.search([], 3) == []
    assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == before
    for k in (0, 2.5, None):
        with pytest.raises(SettingsError, match=f"k is {k}; a whole number"):
            index.search(queries, k)
    for wrong, why in (("a\ud800b", "not valid Unicode at character 1"), (3, "is no text")):
        with pytest.raises(ModelError, match=f"^query .*: {why}|^query .*: no vector: {why}"):
            index.search(["a", wrong])
    with pytest.raises(SettingsError, match=r"nprobe is 3: .* all vectors are compared"):
        index.search(queries, nprobe=3)
    for blank in ("", " \t\n"):
        with pytest.raises(ModelError, match=f"^query {re.escape(repr(blank))}: no vector"):
            index.search(["a", blank])
    with pytest.raises(IndexBuildError, match="must be"):
        index.search(queries[:, :16])


def test_another_model_answers_no_question(stored: tuple[str, np.ndarray], tmp_path: Path) -> None:
    other = make_encoder(tmp_path / "other", seed=5)
    with pytest.raises(ModelError, match=rf"^model {other}: its files differ .* questions need the same"):
        bge_ray.open_index(stored[0], model=str(other)).search("a")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--model", "/nowhere"), "model /nowhere: no such folder"),
        (("--device", "nothing"), "device 'nothing': torch knows none of that name; take cpu or cuda"),
        (("--device", "cuda"), "device 'cuda': torch sees no GPU here; take cpu, which is the default"),
    ],
)
def test_options_of_questions_are_told_by_their_names(
    stored: tuple[str, np.ndarray], words: tuple[str, str], why: str
) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    command = [sys.executable, "-m", "bge_ray", "ask", stored[0], *words, "a question"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert why in ended.stderr
    assert "model.name" not in ended.stderr and "gpus_per" not in ended.stderr


def write_index(root: str, vectors: np.ndarray, code: str = "Flat", **described: Any) -> None:
    """Write what the index job publishes, made by plain FAISS."""
    inner = faiss.index_factory(vectors.shape[1], code, faiss.METRIC_INNER_PRODUCT)
    inner.train(vectors)
    made = inner if code.startswith("IVF") else faiss.IndexIDMap(inner)
    ids = [vector_ids(number, np.arange(rows)) for number, rows in ((0, 40), (1, 20), (2, 10))]
    made.add_with_ids(vectors, np.concatenate(ids))
    data = faiss.serialize_index(made).tobytes()
    folder = Path(root, "index")
    folder.mkdir()
    (folder / "index.faiss").write_bytes(data)
    file = FileFact("index.faiss", len(data), hashlib.sha256(data).hexdigest(), len(vectors))
    dataset = bge_ray.open_dataset(root)
    fingerprint = dataset.spec.vector_fingerprint
    held = [marker.embeddings for marker in dataset.manifest.shards if marker.embeddings is not None]
    description = index_description(
        shards=tuple(fact.sha256[:SHARD_DIGITS] for fact in held),
        vector_fingerprint=fingerprint,
        dim=vectors.shape[1],
        ntotal=len(vectors),
        files=(file,),
        **{"effort": 1, "parameter": None} | described,
    )
    (folder / "index.json").write_bytes(to_json(description))


@pytest.mark.slow
def test_questions_at_a_terminal_are_answered_as_the_api_answers_them(stored: tuple[str, np.ndarray]) -> None:
    root, _ = stored
    asked = ["a first question", "another  one"]
    expected = bge_ray.open_index(root).search(asked, 3, columns=["url"])
    words = [sys.executable, "-m", "bge_ray", "ask", root, "-k", "3", "--column", "url"]
    given = subprocess.run([*words, "--json", *asked], capture_output=True, text=True, check=True)
    assert given.stderr.rstrip().endswith("ask: done; exit code 0")
    rows = [json.loads(line) for line in given.stdout.splitlines()]
    assert [(r["question"], r["rank"], r["passage_id"], r["url"]) for r in rows] == [
        (question, rank, hit.passage_id, hit.columns["url"])
        for question, hits in zip(asked, expected, strict=True)
        for rank, hit in enumerate(hits, 1)
    ]
    scores = [hit.score for hits in expected for hit in hits]
    assert [r["score"] for r in rows] == pytest.approx(scores, abs=1e-6)
    # From standard input, an empty line among it; each answer is there before the next question is.
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for question, hits in zip(asked, expected, strict=True):
            process.stdin.write(f"\n{question}\n")
            process.stdin.flush()
            lines = [process.stdout.readline() for _ in range(5)]
            assert lines[0].split() == question.split()
            assert [line.split()[1] for line in lines[1:4]] == [hit.passage_id for hit in hits]
            assert lines[4].startswith("  exact, ")
        process.stdin.close()
        assert process.wait(30) == 0
    # A line that is no text costs that line alone, and a column that is not there is a mistake in the words.
    lines = b"\xff\xfe\n" + "\u200b\n".encode() + asked[0].encode()
    mixed = subprocess.run([*words, "--json"], input=lines, capture_output=True, check=False)
    assert mixed.returncode == 0
    assert b"this line is not UTF-8 and is not asked" in mixed.stderr
    assert {json.loads(line)["question"] for line in mixed.stdout.splitlines()} == {asked[0]}
    with pytest.raises(SettingsError, match=r"column 'title': .* has none of that name, only .*url"):
        bge_ray.open_index(root).search(asked, 3, columns=["title"])


def test_a_question_to_no_data_set_ends_with_2(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "bge_ray", "ask", str(tmp_path), "a question"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no complete data set there" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("wrong", "why"), [(b"a\xff", "not valid Unicode"), ("\u200b", "says nothing")])
def test_a_question_that_is_none_ends_with_2_before_a_data_set_is_looked_for(wrong: str, why: str) -> None:
    words = [sys.executable, "-m", "bge_ray", "ask", "nowhere", "a question", wrong]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert why in done.stderr
    assert "Traceback" not in done.stderr


def test_a_lossy_index_is_asked_as_it_was_tuned(stored: tuple[str, np.ndarray], tiny_model: Path) -> None:
    """Without a word about rescoring questions find what a search job finds: scores are exact."""
    root, vectors = stored
    write_index(root, np.concatenate([vectors, vectors[:10]]), "SQ4", factory="IDMap2,SQ4", rescore=40, k=10)
    queries = query_vectors(tiny_model, ["passage 3 about topic 3", "topic 5"], query_instruction="find: ")
    index = bge_ray.open_index(root)
    check_hits(index.search(queries, 10), truth(queries, vectors, 10))
    codes = [[hit.score for hit in hits] for hits in index.search(queries, 10, rescored=0)]
    exact = [[hit.score for hit in hits] for hits in index.search(queries, 10, rescored=40)]
    assert np.abs(np.array(codes) - np.array(exact)).max() > 1e-3


def test_lists_are_looked_into_as_many_as_are_asked_for(
    stored: tuple[str, np.ndarray], tiny_model: Path
) -> None:
    root, vectors = stored
    held = np.concatenate([vectors, vectors[:10]])
    write_index(root, held, "IVF8,Flat", kind="IVF", factory="IVF8,Flat", parameter="nprobe", nlist=8)
    queries = query_vectors(tiny_model, ["passage 3 about topic 3", "topic 5"], query_instruction="find: ")
    index = bge_ray.open_index(root)
    check_hits(index.search(queries, 10, nprobe=8), truth(queries, vectors, 10))
    plain = faiss.read_index(str(Path(root, "index", "index.faiss")))
    for nprobe in (1, 2):
        faiss.extract_index_ivf(plain).nprobe = nprobe
        best = plain.search(queries, 1)[0][:, 0]
        found = index.search(queries, 1, nprobe=nprobe)
        assert [hits[0].score for hits in found] == pytest.approx(best.tolist(), abs=1e-6)
    with pytest.raises(SettingsError, match="nprobe is 0; at least 1"):
        index.search(queries, nprobe=0)
