"""The mine job on a real Ray and a real S3 server: truth is brute force over vectors and texts."""

import hashlib
import json
import re
import secrets
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bge_ray.errors import CorpusError, OutputCollisionError, RejectedRowsError, SettingsError
from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import model_folder, pair_feeder, resolve_reranker
from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.mine.job import mine, plan_mine
from bge_ray.records.model import SCORE
from bge_ray.settings.sections import RerankSettings
from bge_ray.storage.objects import join
from tests.support.corpora import docstrings, mixed_objects
from tests.support.datasets import vectors_by_id
from tests.support.models import make_cross_encoder
from tests.support.runs import JobProcess, wait_until
from tests.support.s3 import S3Server
from tests.support.searches import STORAGE, jsonl, query_vectors, read_rejected, settings_for, upload

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

FILES = ("audit.parquet", "lists.parquet", "negatives.jsonl", "rejected.parquet", "tuples.parquet")
RULES = {
    "mine__depth": 60,
    "mine__negatives": 4,
    "mine__relative_margin": 0.002,
    "mine__copy_cosine": 0.9995,
    "mine__copy_overlap": 0.6,
}


def text_of(passage: dict[str, str]) -> str:
    return f"{passage['title']} {passage['text']}".strip()


def corpus() -> list[dict[str, str]]:
    """Real passages; of each that is asked for also a twin, a near copy, and one with its words shuffled."""
    passages = [p for p in docstrings(400) if 12 < len(p["text"].split()) < 200]
    copies = []
    for passage in passages[::20]:
        words = passage["text"].split()
        changes = {"twin": words, "near": [*words[:-1], "indeed"], "shuffled": sorted(words)}
        copies += [
            {"id": f"{kind}-{passage['id']}", "title": passage["title"], "text": " ".join(changed)}
            for kind, changed in changes.items()
            if kind != "twin"
        ]
        copies.append({**passage, "id": f"twin-{passage['id']}"})
    return passages + copies


@pytest.fixture(scope="module")
def passages() -> dict[str, dict[str, str]]:
    return {passage["id"]: passage for passage in corpus()}


@pytest.fixture(scope="module")
def root(s3_server: S3Server, ray_cluster: None, tiny_model: Path) -> str:
    """A data set, queries that are beginnings of its passages, and judgements of these."""
    root = f"s3://out/mine-{secrets.token_hex(4)}"
    found = corpus()
    upload(f"{root}/corpus", mixed_objects(found))
    keys = {"corpus__uri": f"{root}/corpus", "output__uri": f"{root}/data", "model__name": str(tiny_model)}
    embed(settings_for(**keys, batching__unit_rows=60))
    asked = [p for p in found if not re.match("twin-|near-|shuffled-", p["id"])][::20]
    queries = [{"_id": f"q{i}", "text": " ".join(text_of(p).split()[:-3])} for i, p in enumerate(asked)]
    queries += [{"_id": "unjudged", "text": "nobody judged this"}, {"_id": "none", "text": "judged 0"}]
    queries += [{"_id": "lost", "text": "its positive is gone"}]
    lines = [f"q{i} 0 {p['id']} 1" for i, p in enumerate(asked)]
    lines += ["q0 0 nowhere 2", "none 0 nowhere 0", "lost 0 nowhere 1", "absent 0 nowhere 1"]
    # A second positive, and a passage that was judged and found wanting.
    lines += [f"q1 0 {asked[0]['id']} 1", f"q2 0 {asked[0]['id']} 0"]
    upload(root, {"queries.jsonl": jsonl(queries), "qrels.txt": "".join(f"{x}\n" for x in lines).encode()})
    return root


def keys_for(root: str, output: str, **more: object) -> dict[str, object]:
    keys = {
        "output__uri": f"{root}/data",
        "mine__queries": f"{root}/queries.jsonl",
        "mine__qrels": f"{root}/qrels.txt",
        "mine__output": output,
        "mine__max_rejected_fraction": 0.5,
        "search__unit_queries": 5,
    }
    return keys | RULES | more


def read(output: str, name: str) -> list[dict[str, object]]:
    data = STORAGE.read(join(output, name))
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in data.splitlines()]
    return pq.read_table(pa.BufferReader(data)).to_pylist()


def digests(output: str) -> dict[str, str]:
    return {name: hashlib.sha256(STORAGE.read(join(output, name))).hexdigest() for name in FILES}


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def judged(root: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in STORAGE.read(f"{root}/qrels.txt").decode().splitlines():
        query_id, _, passage_id, relevance = line.split()
        if int(relevance) > 0 and passage_id != "nowhere":
            found.setdefault(query_id, []).append(passage_id)
    return found


def expected(
    query: str,
    vector: np.ndarray,
    positives: list[str],
    vectors: dict[str, np.ndarray],
    texts: dict[str, str],
) -> dict[str, str]:
    """The verdict on each result and positive of a query, rule by rule, in plain Python."""
    scores = {name: float((found.astype(np.float64) * vector).sum()) for name, found in vectors.items()}
    order = sorted(scores, key=lambda name: (-round(scores[name], 6), name))[: RULES["mine__depth"]]
    lowest = min(scores[name] for name in positives)
    verdicts = {}
    for name in order:
        cosine = max(float(vectors[name].astype(np.float64) @ vectors[p]) for p in positives)
        shared = max(
            len(words(texts[name]) & words(texts[p])) / len(words(texts[name]) | words(texts[p]))
            for p in positives
        )
        if name in positives:
            verdicts[name] = "positive"
        elif texts[name] in [texts[p] for p in positives] or texts[name] == query:
            verdicts[name] = "same_text"
        elif cosine >= RULES["mine__copy_cosine"]:
            verdicts[name] = "copy_by_vector"
        elif shared >= RULES["mine__copy_overlap"]:
            verdicts[name] = "copy_by_words"
        elif scores[name] > lowest - RULES["mine__relative_margin"] * abs(lowest):
            verdicts[name] = "margin"
        else:
            left = sum(verdict == "negative" for verdict in verdicts.values())
            verdicts[name] = "negative" if left < RULES["mine__negatives"] else "not_drawn"
    return verdicts | dict.fromkeys(positives, "positive")


def test_every_verdict_equals_brute_force(
    root: str, bucket: str, tiny_model: Path, passages: dict[str, dict[str, str]]
) -> None:
    report = mine(settings_for(**keys_for(root, bucket, search__exact=True)))
    queries = {
        q["_id"]: q["text"] for q in map(json.loads, STORAGE.read(f"{root}/queries.jsonl").splitlines())
    }
    positives = judged(root)
    vectors, texts = vectors_by_id(f"{root}/data"), {name: text_of(p) for name, p in passages.items()}
    audit: dict[str, dict[str, str]] = {}
    for row in read(bucket, "audit.parquet"):
        if row["reason"] != "unknown_positive":
            assert row["passage_id"] not in audit.setdefault(row["query_id"], {})  # once each
            audit[row["query_id"]][row["passage_id"]] = row["reason"]
            assert row["kept"] == (row["reason"] == "negative")
    encoded = query_vectors(tiny_model, [queries[name] for name in positives])
    seen: Counter[str] = Counter()
    for (name, own), vector in zip(positives.items(), encoded, strict=True):
        assert audit[name] == expected(queries[name], vector, own, vectors, texts), name
        seen.update(audit[name].values())
    assert {
        "positive",
        "same_text",
        "copy_by_vector",
        "copy_by_words",
        "margin",
        "negative",
        "not_drawn",
    } <= {*seen}
    assert {k: v for k, v in report.verdicts.items() if v} == dict(seen)

    # The training files say the same, in the words of the corpus.
    found = {record["query_id"]: record for record in read(bucket, "negatives.jsonl")}
    assert found.keys() == {name for name, of_query in audit.items() if "negative" in of_query.values()}
    for name, record in found.items():
        assert record["query"] == queries[name]
        for side, verdict in (("pos", "positive"), ("neg", "negative")):
            assert set(record[f"{side}_id"]) == {p for p, v in audit[name].items() if v == verdict}
            assert record[side] == [texts[p] for p in record[f"{side}_id"]]
            truth = [
                vectors[p].astype(np.float64) @ encoded[list(positives).index(name)]
                for p in record[f"{side}_id"]
            ]
            np.testing.assert_allclose(record[f"{side}_scores"], truth, atol=2e-6)
            assert record[f"{side}_scores"] == sorted(record[f"{side}_scores"], reverse=True)
    full = [record for record in found.values() if len(record["neg"]) == 4]
    tuples = [
        {"anchor": r["query"], "positive": p, **{f"negative_{i}": n for i, n in enumerate(r["neg"], 1)}}
        for r in full
        for p in r["pos"]
    ]
    assert read(bucket, "tuples.parquet") == tuples
    assert read(bucket, "lists.parquet") == [
        {
            "query": r["query"],
            "docs": r["pos"] + r["neg"],
            "labels": [1] * len(r["pos"]) + [0] * len(r["neg"]),
        }
        for r in found.values()
    ]

    # Counts in are counts out.
    rejected = read_rejected(bucket)
    assert ("q0", "nowhere", "unknown_positive") in rejected
    assert ("lost", None, "unknown_positive") in rejected
    assert ("none", None, "no_positive") in rejected
    assert ("absent", None, "unknown_query") in rejected
    whole = [name for name, passage_id, _ in rejected if passage_id is None]
    assert len(whole) == len(set(whole))
    assert set(whole).isdisjoint(found)
    assert report.queries_in == report.queries_out + len(whole)
    assert (report.queries_out, report.queries_unjudged, report.positives_unknown) == (len(found), 1, 2)
    assert report.negatives == sum(len(record["neg"]) for record in found.values())
    assert (report.tuples, report.queries_short) == (len(tuples), len(found) - len(full))
    assert sum(report.gaps.counts) == report.negatives
    assert {file.path for file in report.files} == set(FILES)
    assert STORAGE.list_files(f"{bucket}/work") == []
    page = STORAGE.read(f"{bucket}/report.html").decode()
    assert "copy_by_words" in page
    assert {example.verdict for example in report.examples} >= {"margin", "negative", "copy_by_words"}
    for example in report.examples:
        assert audit[example.query_id][example.passage_id] == example.verdict
        assert texts[example.passage_id].startswith(example.passage)


@pytest.mark.slow
def test_a_rerun_has_nothing_to_do_and_a_new_run_writes_the_same_bytes(root: str, bucket: str) -> None:
    keys = keys_for(root, f"{bucket}/a", mine__sampling="random", mine__seed=7)
    assert "to be done" in plan_mine(settings_for(**keys))
    assert STORAGE.list_files(bucket) == []
    mine(settings_for(**keys))
    assert mine(settings_for(**keys)).outcome == "nothing to do"
    assert "up to date" in plan_mine(settings_for(**keys))
    first = digests(f"{bucket}/a")
    mine(settings_for(**keys | {"mine__output": f"{bucket}/b"}))
    assert digests(f"{bucket}/b") == first
    mine(settings_for(**keys | {"mine__seed": 8}))
    assert digests(f"{bucket}/a")["negatives.jsonl"] != first["negatives.jsonl"]
    drawn = Counter(row["reason"] for row in read(f"{bucket}/a", "audit.parquet"))
    before = Counter(row["reason"] for row in read(f"{bucket}/b", "audit.parquet"))
    assert drawn == before  # as many of each: only which are drawn differs


@pytest.mark.slow
def test_examples_by_text_and_by_id_give_what_queries_and_judgements_give(
    root: str, bucket: str, passages: dict[str, dict[str, str]]
) -> None:
    queries = {
        q["_id"]: q["text"] for q in map(json.loads, STORAGE.read(f"{root}/queries.jsonl").splitlines())
    }
    texts = {name: text_of(p) for name, p in passages.items()}
    by_text, by_id = [], []
    for name, own in judged(root).items():
        record = {"_id": name, "query": queries[name], "pos": [texts[p] for p in own], "neg": ["x"]}
        by_text.append(record | {"prompt": "Find it: ", "type": "normal"})
        by_id.append(record | {"pos_id": own})
    by_text.append({"query": "no such text", "pos": ["nowhere to be found"]})
    upload(bucket, {"text.jsonl": jsonl(by_text), "id.jsonl": jsonl(by_id)})
    mine(settings_for(**keys_for(root, f"{bucket}/truth")))
    found = {}
    for name in ("text", "id"):
        keys = keys_for(root, f"{bucket}/{name}", mine__input=f"{bucket}/{name}.jsonl")
        mine(settings_for(**keys | {"mine__queries": None, "mine__qrels": None}))
        found[name] = {record["query_id"]: record for record in read(f"{bucket}/{name}", "negatives.jsonl")}
    truth = {record["query_id"]: record for record in read(f"{bucket}/truth", "negatives.jsonl")}
    assert {name: record["neg_id"] for name, record in found["id"].items()} == {
        name: record["neg_id"] for name, record in truth.items()
    }
    for name, record in found["text"].items():
        assert (record["prompt"], record["type"]) == ("Find it: ", "normal")
        assert record["neg"] == truth[name]["neg"]
        # The twin has the same text, and stands for the positive where it comes first.
        assert sorted(record["pos"]) == sorted(truth[name]["pos"])
    assert (str(len(by_text)), None, "unknown_positive") in read_rejected(f"{bucket}/text")


@pytest.mark.slow
def test_a_teacher_scores_what_is_left_and_drops_by_logits(
    root: str, bucket: str, tmp_path: Path, passages: dict[str, dict[str, str]]
) -> None:
    reranker = make_cross_encoder(tmp_path / "reranker", positions=128)
    keys = keys_for(root, bucket, mine__teacher=True, rerank__model=str(reranker), rerank__max_length=96)
    report = mine(settings_for(**keys, mine__teacher_relative_margin=0.1))
    assert report.teacher == str(reranker)
    texts = {name: text_of(p) for name, p in passages.items()}
    queries = {
        q["_id"]: q["text"] for q in map(json.loads, STORAGE.read(f"{root}/queries.jsonl").splitlines())
    }
    rows = [row for row in read(bucket, "audit.parquet") if row["teacher_score"] is not None]
    spec = resolve_reranker(RerankSettings(model=str(reranker), max_length=96), on_gpu=False)
    pairs = pair_feeder(spec).pairs(
        [queries[r["query_id"]] for r in rows], [texts[r["passage_id"]] for r in rows]
    )
    model = Model(spec, model_folder(spec), Place())
    result = model.empty_result(len(rows))
    model.run(pairs, model.cut(pairs, 1024), result)
    np.testing.assert_allclose([r["teacher_score"] for r in rows], result.array(SCORE), atol=1e-4)
    scored = {"positive", "negative", "not_drawn", "teacher_margin"}
    assert {r["reason"] for r in read(bucket, "audit.parquet") if r["teacher_score"] is not None} == scored
    by_query: dict[str, list[dict[str, object]]] = {}
    for row in rows:
        by_query.setdefault(row["query_id"], []).append(row)
    for found in by_query.values():
        lowest = min(r["teacher_score"] for r in found if r["reason"] == "positive")
        bound = lowest - 0.1 * abs(lowest)
        for row in found:
            if row["reason"] != "positive":
                assert (row["reason"] == "teacher_margin") == (row["teacher_score"] > bound)
        taken = sorted((r["teacher_score"] for r in found if r["reason"] == "negative"), reverse=True)
        left = sorted(
            (r["teacher_score"] for r in found if r["reason"] in ("negative", "not_drawn")), reverse=True
        )
        assert taken == left[:4]  # the top by the teacher
    scores = {(r["query_id"], r["passage_id"]): r["teacher_score"] for r in rows}
    for record in read(bucket, "negatives.jsonl"):
        for side in ("pos", "neg"):
            asked = [scores[record["query_id"], name] for name in record[f"{side}_id"]]
            assert record[f"{side}_scores"] == asked


@pytest.mark.slow
def test_held_out_queries_are_kept_out(root: str, bucket: str) -> None:
    queries = [json.loads(line) for line in STORAGE.read(f"{root}/queries.jsonl").splitlines()]
    upload(
        bucket, {"test.jsonl": jsonl([{"_id": "x", "text": queries[3]["text"].upper().replace(" ", "  ")}])}
    )
    mine(settings_for(**keys_for(root, f"{bucket}/out", mine__held_out=f"{bucket}/test.jsonl")))
    assert (queries[3]["_id"], None, "held_out") in read_rejected(f"{bucket}/out")
    assert queries[3]["_id"] not in {r["query_id"] for r in read(f"{bucket}/out", "negatives.jsonl")}


def test_what_cannot_be_mined_is_refused_before_anything_is_written(root: str, bucket: str) -> None:
    upload(bucket, {"zero.txt": b"q0 0 nowhere 0\n"})
    refused = [
        ({"mine__qrels": f"{bucket}/none.txt"}, CorpusError, "no such object"),
        ({"mine__qrels": f"{bucket}/zero.txt"}, CorpusError, "no query has a positive"),
        ({"mine__qrels": None}, SettingsError, "mine.qrels"),
        ({"mine__input": f"{bucket}/zero.txt"}, SettingsError, "mine.input: says what"),
        ({"mine__output": f"{root}/data"}, OutputCollisionError, "mine.output"),
        ({"mine__output": f"{root}/corpus"}, OutputCollisionError, "corpus of output.uri"),
        ({"output__uri": f"{bucket}/no-data"}, SettingsError, "no complete data set|no data set"),
        ({"search__k": 9, "search__rescore": 70, "mine__depth": 80}, SettingsError, "mine.depth"),
    ]
    for change, kind, said in refused:
        with pytest.raises(kind, match=said) as caught:
            mine(settings_for(**keys_for(root, f"{bucket}/out") | change))
        assert caught.value.exit_code == 2, change
    assert STORAGE.list_files(f"{bucket}/out") == []


@pytest.mark.slow
def test_what_is_mined_for_nothing_fails_and_what_lost_too_much_is_there(root: str, bucket: str) -> None:
    upload(bucket, {"other.txt": b"nobody 0 nowhere 1\n"})
    with pytest.raises(CorpusError, match="no query is left to be mined for"):
        mine(settings_for(**keys_for(root, f"{bucket}/out", mine__qrels=f"{bucket}/other.txt")))
    with pytest.raises(RejectedRowsError, match="no query has a negative"):
        mine(settings_for(**keys_for(root, f"{bucket}/out", mine__max_score=-1.0)))
    with pytest.raises(RejectedRowsError, match=r"mine\.max_rejected_fraction"):
        mine(settings_for(**keys_for(root, f"{bucket}/out", mine__max_rejected_fraction=0.0)))
    assert read(f"{bucket}/out", "negatives.jsonl")  # published all the same


@pytest.mark.slow
@pytest.mark.parity
def test_the_readers_of_both_trainers_take_the_files(root: str, bucket: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from FlagEmbedding.abc.finetune.embedder import AbsEmbedderDataArguments, AbsEmbedderTrainDataset

    mine(settings_for(**keys_for(root, bucket)))
    for name in FILES:
        (tmp_path / name).write_bytes(STORAGE.read(join(bucket, name)))
    cache = str(tmp_path / "cache")
    for distils in (False, True):
        arguments = AbsEmbedderDataArguments(
            train_data=[str(tmp_path / "negatives.jsonl")],
            cache_path=cache,
            train_group_size=5,
            knowledge_distillation=distils,
        )
        found = AbsEmbedderTrainDataset(arguments, tokenizer=None)
        records = read(bucket, "negatives.jsonl")
        assert len(found) == len(records)
        for number, record in enumerate(records):
            query, texts, scores = found[number]
            assert query == record["query"]
            assert texts[0] in record["pos"]
            assert set(texts[1:]) <= set(record["neg"])
            assert (scores is not None) == distils
    for name, rows in (("tuples", "anchor"), ("lists", "query"), ("audit", "query_id")):
        loaded = datasets.load_dataset(
            "parquet", data_files=str(tmp_path / f"{name}.parquet"), split="train", cache_dir=cache
        )
        assert loaded[rows] == [row[rows] for row in read(bucket, f"{name}.parquet")]
    assert loaded.column_names[-2:] == ["kept", "reason"]


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again_it_writes_the_same_bytes(
    root: str, bucket: str, tmp_path: Path
) -> None:
    truth = keys_for(root, f"{bucket}/truth", mine__sampling="random", search__unit_queries=2)
    mine(settings_for(**truth))
    keys = {name.replace("__", "."): json.dumps(value) for name, value in truth.items()}
    keys |= {"mine.output": f"{bucket}/killed", "resources.num_encoders": "1"}
    first = JobProcess(tmp_path / "log", keys, job="mine")
    wait_until(lambda: len(STORAGE.list_files(f"{bucket}/killed/work/parts")) >= 2, 200)
    first.kill()
    done = {info.uri for info in STORAGE.list_files(f"{bucket}/killed/work/parts")}
    assert STORAGE.info(f"{bucket}/killed/report.json") is None
    report = mine(settings_for(**truth | {"mine__output": f"{bucket}/killed"}))
    assert report.units_done == report.units - len(done)
    assert digests(f"{bucket}/killed") == digests(f"{bucket}/truth")
