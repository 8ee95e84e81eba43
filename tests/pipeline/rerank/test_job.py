"""The rerank job on a real Ray and a real S3 server: truth is FlagReranker, or our model in this process."""

import json
import random
import secrets
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from bge_ray.errors import CorpusError, ModelError, RejectedRowsError, SettingsError
from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import model_folder, pair_feeder, resolve_reranker
from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.rerank.job import plan_rerank, rerank
from bge_ray.records.canonical import from_json
from bge_ray.records.model import SCORE
from bge_ray.records.reports import RerankReport
from bge_ray.settings.sections import RerankSettings
from tests.support.corpora import docstrings, mixed_objects
from tests.support.llm_rerankers import make_llm_reranker
from tests.support.models import make_cross_encoder, make_encoder
from tests.support.s3 import S3Server
from tests.support.searches import (
    STORAGE,
    by_query,
    jsonl,
    read_rejected,
    read_run,
    settings_for,
    upload,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

WORDS = "the quick brown fox jumps over lazy dog a corpus in object storage becomes embeddings and an index"


@pytest.fixture(scope="module")
def cross_encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rerankers")
    return {k: make_cross_encoder(folder / k, kind=k, positions=128) for k in ("bert", "xlm-roberta")}


@pytest.fixture(scope="module")
def data(s3_server: S3Server, ray_cluster: None, tiny_model: Path) -> str:
    """A data set of real passages with titles, in all formats, that keeps no texts."""
    root = f"s3://out/rerank-{secrets.token_hex(4)}"
    upload(f"{root}/corpus", mixed_objects(docstrings(300)))
    keys = {"corpus__uri": f"{root}/corpus", "output__uri": f"{root}/data", "model__name": str(tiny_model)}
    embed(settings_for(**keys, batching__unit_rows=40))
    return f"{root}/data"


def text_of(record: dict[str, str]) -> str:
    return f"{record['title']} {record['text']}".strip()


def scores_here(folder: Path, pairs: list[tuple[str, str]]) -> list[float]:
    spec = resolve_reranker(RerankSettings(model=str(folder)), on_gpu=False)
    rows = pair_feeder(spec).pairs([q for q, _ in pairs], [p for _, p in pairs])
    model = Model(spec, model_folder(spec), Place())
    result = model.empty_result(len(pairs))
    model.run(rows, model.cut(rows, 1024), result)
    return result.array(SCORE).tolist()


def lists(seed: int, count: int, size: int) -> list[dict[str, object]]:
    """Candidate lists with texts inline: short, long and overlong queries and passages."""
    rng = random.Random(seed)
    words = WORDS.split()

    def text(n: int) -> str:
        return " ".join(rng.choices(words, k=n))

    return [
        {
            "query_id": f"q{i}",
            "query": text(rng.choice([1, 4, 12, 90, 97, 300])),
            "passages": [
                {"passage_id": f"p{j}", "text": text(rng.choice([1, 3, 20, 60, 120, 126, 400]))}
                for j in range(size)
            ],
        }
        for i in range(count)
    ]


@pytest.mark.parity
@pytest.mark.parametrize("kind", [pytest.param("bert", marks=pytest.mark.slow), "xlm-roberta"])
def test_logits_equal_flag_reranker_and_runs_sort_equally(
    bucket: str, cross_encoders: dict[str, Path], kind: str
) -> None:
    from FlagEmbedding import FlagReranker

    records = lists(4, 12, 9)
    upload(bucket, {"c.jsonl": jsonl(records)})
    report = rerank(
        settings_for(
            rerank__model=str(cross_encoders[kind]),
            rerank__max_length=96,
            rerank__candidates=f"{bucket}/c.jsonl",
            rerank__output=f"{bucket}/run",
            rerank__unit_pairs=25,
            rerank__num_rerankers=2,
        )
    )
    assert report.units > 3
    theirs = FlagReranker(str(cross_encoders[kind]), use_fp16=False, devices="cpu", max_length=96)
    rows = read_run(f"{bucket}/run")
    found = by_query(rows)
    assert list(found) == [r["query_id"] for r in records]
    for record in records:
        pairs = [(record["query"], p["text"]) for p in record["passages"]]
        truth = dict(
            zip((p["passage_id"] for p in record["passages"]), theirs.compute_score(pairs), strict=True)
        )
        ours = dict(found[record["query_id"]])
        assert ours.keys() == truth.keys()
        assert max(abs(ours[p] - truth[p]) for p in truth) <= 1e-4
        assert [p for p, _ in found[record["query_id"]]] == sorted(truth, key=lambda p: (-truth[p], p))
    logits = np.array([row["score"] for row in rows])
    assert np.ptp(logits) > 0.1
    np.testing.assert_allclose([row["probability"] for row in rows], 1 / (1 + np.exp(-logits)), atol=1e-6)


@pytest.mark.slow
def test_a_layer_wise_reranker_gives_a_column_a_layer(bucket: str, tmp_path: Path) -> None:
    folder = make_llm_reranker(tmp_path / "layerwise", "minicpm")
    records = lists(6, 4, 6)
    upload(bucket, {"c.jsonl": jsonl(records)})
    asked = {"model": str(folder), "max_length": 64, "cutoff_layers": (2, 4, 5)}
    report = rerank(
        settings_for(
            **{f"rerank__{key}": value for key, value in asked.items()},
            rerank__candidates=f"{bucket}/c.jsonl",
            rerank__output=f"{bucket}/run",
            rerank__unit_pairs=9,
            rerank__num_rerankers=1,
        )
    )
    assert (report.pairs_in, report.pairs_out) == (24, 24)
    table = pq.read_table(pa.BufferReader(STORAGE.read(f"{bucket}/run/run.parquet")))
    layers = ["layer_2", "layer_4", "layer_5"]
    assert table.column_names[-4:] == ["probability", *layers]
    assert {table.schema.field(name).type for name in layers} == {pa.float32()}
    texts = {
        (r["query_id"], p["passage_id"]): (r["query"], p["text"]) for r in records for p in r["passages"]
    }
    rows = [texts[row["query_id"], row["passage_id"]] for row in table.to_pylist()]
    spec = resolve_reranker(RerankSettings(**asked), on_gpu=False)
    tokens = pair_feeder(spec).pairs([q for q, _ in rows], [p for _, p in rows])
    model = Model(spec, model_folder(spec), Place())
    result = model.empty_result(len(rows))
    model.run(tokens, model.cut(tokens, 1024), result)
    for name in layers:
        np.testing.assert_allclose(table[name].to_numpy(), result.array(name), atol=1e-4)
        assert np.ptp(table[name].to_numpy()) > 0.1
    np.testing.assert_array_equal(table["score"].to_numpy(), table["layer_5"].to_numpy().astype(np.float64))
    scored = [output["name"] for output in report.scoring.model["outputs"]]
    assert (scored, list(report.scoring.model["layers"])) == (["score", *layers], [2, 4, 5])
    page = STORAGE.read(f"{bucket}/run/report.html").decode()
    assert "score, layer_2, layer_4, layer_5; score is of layer 5" in page


@pytest.mark.slow
def test_texts_of_bare_ids_are_those_that_were_embedded(
    bucket: str, data: str, cross_encoders: dict[str, Path]
) -> None:
    """A TREC run over passages of all formats, joined with the corpus; lists overlap, groups are small."""
    passages = docstrings(300)
    rng = random.Random(1)
    run: dict[str, list[str]] = {f"q{i}": [p["id"] for p in rng.sample(passages, 12)] for i in range(15)}
    trec = "".join(
        f"{q} Q0 {p} {rank} {1 / rank} x\n" for q, ids in run.items() for rank, p in enumerate(ids, 1)
    )
    queries = {q: f"what does {q} of the corpus do" for q in run}
    records = [{"_id": q, "text": text} for q, text in queries.items()]
    upload(bucket, {"run.trec": trec.encode(), "queries.jsonl": jsonl(records)})
    report = rerank(
        settings_for(
            output__uri=data,
            search__queries=f"{bucket}/queries.jsonl",
            rerank__candidates=f"{bucket}/run.trec",
            rerank__output=f"{bucket}/out",
            rerank__model=str(cross_encoders["bert"]),
            rerank__depth=7,
            rerank__unit_pairs=20,
            rerank__join_pairs=50,
        )
    )
    assert (report.pairs_in, report.pairs_out, report.queries) == (105, 105, 15)
    found = by_query(read_run(f"{bucket}/out"))
    by_id = {p["id"]: text_of(p) for p in passages}
    for query_id, ids in run.items():
        ours = dict(found[query_id])
        assert set(ours) == set(ids[:7])  # the first seven, by the scores of the run
        truth = scores_here(cross_encoders["bert"], [(queries[query_id], by_id[p]) for p in ids[:7]])
        np.testing.assert_allclose([ours[p] for p in ids[:7]], truth, atol=1e-5)


@pytest.mark.slow
def test_kept_columns_serve_as_texts_when_the_corpus_is_gone(
    bucket: str, tiny_model: Path, cross_encoders: dict[str, Path]
) -> None:
    passages = docstrings(300)[:50]
    upload(f"{bucket}/corpus", mixed_objects(passages))
    keys = {
        "corpus__uri": f"{bucket}/corpus",
        "output__uri": f"{bucket}/data",
        "model__name": str(tiny_model),
    }
    embed(settings_for(**keys, corpus__keep_columns=["title", "text"]))
    STORAGE.delete([info.uri for info in STORAGE.list_files(f"{bucket}/corpus")])
    lines = [{"query_id": "q", "query": "a fox", "passage_id": p["id"], "score": 1.0} for p in passages[::7]]
    upload(bucket, {"c.jsonl": jsonl(lines)})
    keys = {
        "output__uri": f"{bucket}/data",
        "rerank__candidates": f"{bucket}/c.jsonl",
        "rerank__output": f"{bucket}/out",
        "rerank__model": str(cross_encoders["bert"]),
    }
    report = rerank(settings_for(**keys))
    assert report.pairs_out == len(lines)
    ours = dict(by_query(read_run(f"{bucket}/out"))["q"])
    truth = scores_here(cross_encoders["bert"], [("a fox", text_of(p)) for p in passages[::7]])
    np.testing.assert_allclose([ours[p["id"]] for p in passages[::7]], truth, atol=1e-5)


@pytest.mark.slow
def test_flag_embeddings_training_format_and_parquet_say_the_same(
    bucket: str, cross_encoders: dict[str, Path]
) -> None:
    records = [
        {"query": "the fox", "pos": ["the quick fox"], "neg": ["a dog", "an index"]},
        {"query": "storage", "pos": ["object storage", "a corpus"], "neg": []},
    ]
    table = pa.Table.from_pylist(records)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    upload(bucket, {"c.jsonl": jsonl(records), "c.parquet": bytes(sink.getvalue())})
    found = []
    for name in ("c.jsonl", "c.parquet"):
        keys = {"rerank__candidates": f"{bucket}/{name}", "rerank__output": f"{bucket}/{name}-run"}
        rerank(settings_for(**keys, rerank__model=str(cross_encoders["xlm-roberta"])))
        found.append(list(by_query(read_run(f"{bucket}/{name}-run")).values()))
    assert found[0] == found[1]
    assert [{p for p, _ in pairs} for pairs in found[0]] == [{"pos-0", "neg-0", "neg-1"}, {"pos-0", "pos-1"}]


def test_bad_candidates_are_named_and_counted_and_the_rest_is_done(
    bucket: str, data: str, cross_encoders: dict[str, Path]
) -> None:
    passages = docstrings(300)
    good = passages[0]["id"]
    lines = [
        {
            "query_id": "ok",
            "query": "fine",
            "passages": [{"passage_id": good}, {"passage_id": passages[1]["id"]}],
        },
        {"query_id": "unknown", "query": "fine", "passages": [{"passage_id": good}, {"passage_id": "-1"}]},
        {"query_id": "ok", "query": "again", "passages": [{"passage_id": good}]},
        {"query_id": "twice", "query": "fine", "passages": [{"passage_id": good}, {"passage_id": good}]},
        {"query_id": "empty", "query": "fine", "passages": []},
        {"query_id": "blank", "query": " ", "passages": [{"passage_id": good}]},
        {"query_id": "no text", "passages": [{"passage_id": good}]},
        {"query_id": "typed", "query": 7, "passages": [{"passage_id": good}]},
        {"query_id": "shape", "query": "fine", "candidates": []},
        {
            "query_id": "many",
            "query": "fine",
            "passages": [{"passage_id": str(i), "text": f"fox {i}"} for i in range(3000)],
        },
        {
            "query_id": "long",
            "query": "fox " * 9000,
            "passages": [{"passage_id": "x", "text": "dog " * 90_000}],
        },
        {
            "query_id": "lost",
            "query": "fine",
            "passages": [f"lost {i}" for i in range(600)],
        },  # a unit of its own
        {"query_id": "nothing", "query": "fine", "passages": [{"passage_id": "x", "text": ""}]},
    ]
    upload(
        bucket, {"c.jsonl": jsonl(lines) + b"not json\n[]\n", "q.jsonl": jsonl([{"_id": "x", "text": "y"}])}
    )
    settings = settings_for(
        output__uri=data,
        search__queries=f"{bucket}/q.jsonl",
        rerank__candidates=f"{bucket}/c.jsonl",
        rerank__output=f"{bucket}/out",
        rerank__model=str(cross_encoders["bert"]),
        rerank__depth=5000,
        rerank__unit_pairs=500,
        rerank__max_rejected_fraction=0.001,
    )
    with pytest.raises(RejectedRowsError, match="the run is published"):
        rerank(settings)
    found = by_query(read_run(f"{bucket}/out"))
    assert {q: len(pairs) for q, pairs in found.items()} == {
        "ok": 2,
        "unknown": 1,
        "twice": 1,
        "many": 3000,
        "long": 1,
        "nothing": 1,
    }
    rejected = read_rejected(f"{bucket}/out")
    assert sum(entry[0] == "lost" for entry in rejected) == 600
    assert sorted((entry for entry in rejected if entry[0] != "lost"), key=str) == sorted(
        [
            ("unknown", "-1", "unknown_passage"),
            ("ok", None, "duplicate_query"),
            ("twice", good, "duplicate_passage"),
            ("empty", None, "empty_list"),
            ("blank", None, "empty_query"),
            ("no text", None, "unknown_query"),
            ("typed", None, "malformed"),
            ("shape", None, "malformed"),
            (None, None, "malformed"),
            (None, None, "malformed"),
        ],
        key=str,
    )
    report = from_json(RerankReport, STORAGE.read(f"{bucket}/out/report.json"))
    assert report.pairs_in == report.pairs_out + 602  # unknown ids, and the one that stands twice
    assert report.scoring.truncated_pairs >= 1
    assert sum(report.rejected_reasons.values()) == 610


def test_a_folder_without_a_trained_head_is_refused(
    bucket: str, cross_encoders: dict[str, Path], tmp_path: Path, tiny_model: Path
) -> None:
    upload(bucket, {"c.jsonl": jsonl(lists(1, 2, 2))})
    keys = {"rerank__candidates": f"{bucket}/c.jsonl", "rerank__output": f"{bucket}/out"}
    headless = tmp_path / "headless"
    shutil.copytree(cross_encoders["bert"], headless)
    weights = load_file(headless / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if not k.startswith("classifier")},
        headless / "model.safetensors",
        metadata={"format": "pt"},
    )
    for model, message in [
        (headless, "no classification head"),
        (tiny_model, "no classification head"),
        ("/no/such", "no such folder"),
    ]:
        with pytest.raises(ModelError, match=message):
            rerank(settings_for(**keys, rerank__model=str(model)))
    two = tmp_path / "two"
    shutil.copytree(cross_encoders["bert"], two)
    config = json.loads((two / "config.json").read_text())
    config["id2label"] = {"0": "no", "1": "yes"}
    (two / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="2 outputs"):
        rerank(settings_for(**keys, rerank__model=str(two)))
    assert STORAGE.list_files(f"{bucket}/out") == []


def test_what_is_missing_is_said(bucket: str, cross_encoders: dict[str, Path], data: str) -> None:
    model = str(cross_encoders["bert"])
    lines = [{"query_id": "a", "passage_id": "1", "query": "fox"}, {"query_id": "b", "passage_id": "1"}]
    upload(bucket, {"a.jsonl": jsonl(lines[:1]), "b.jsonl": jsonl(lines[1:]), "empty.trec": b""})
    keys = {"rerank__model": model, "rerank__output": f"{bucket}/out"}
    with pytest.raises(SettingsError, match=r"rerank\.candidates"):
        rerank(settings_for(**keys))
    with pytest.raises(SettingsError, match=r"output\.uri"):
        rerank(settings_for(**keys, rerank__candidates=f"{bucket}/a.jsonl"))
    with pytest.raises(SettingsError, match=r"search\.queries"):
        rerank(settings_for(**keys, rerank__candidates=f"{bucket}/b.jsonl", output__uri=data))
    with pytest.raises(SettingsError, match=r"rerank\.texts kept"):
        keys |= {"rerank__candidates": f"{bucket}/a.jsonl", "output__uri": data}
        rerank(settings_for(**keys, rerank__texts="kept"))
    with pytest.raises(
        SettingsError, match=r"rerank\.first_stage_share: a candidate of query 'a' has no score"
    ):
        rerank(settings_for(**keys, rerank__first_stage_share=0.5))
    for name in ("empty.trec", "nothing.trec"):
        with pytest.raises(CorpusError):
            rerank(settings_for(**keys | {"rerank__candidates": f"{bucket}/{name}"}))
    assert "1 pairs of 1 queries" in plan_rerank(settings_for(**keys))
    assert STORAGE.info(f"{bucket}/out/run.parquet") is None


@pytest.mark.slow
def test_a_second_run_does_nothing_and_a_longer_list_of_queries_does_the_rest(
    bucket: str, cross_encoders: dict[str, Path]
) -> None:
    records = lists(7, 20, 5)
    keys = {
        "rerank__model": str(cross_encoders["bert"]),
        "rerank__candidates": f"{bucket}/c.jsonl",
        "rerank__output": f"{bucket}/out",
        "rerank__unit_pairs": 25,
    }
    upload(bucket, {"c.jsonl": jsonl(records[:10])})
    first = rerank(settings_for(**keys))
    assert rerank(settings_for(**keys)).outcome == "nothing to do"
    upload(bucket, {"c.jsonl": jsonl(records)})
    longer = rerank(settings_for(**keys))
    assert (first.queries, longer.queries) == (10, 20)
    # The same candidates under another model are another run.
    other = rerank(settings_for(**keys | {"rerank__model": str(cross_encoders["xlm-roberta"])}))
    assert other.outcome == "complete"


def test_an_encoder_that_is_no_reranker_is_named(bucket: str, tmp_path: Path) -> None:
    upload(bucket, {"c.jsonl": jsonl(lists(1, 1, 1))})
    model = make_encoder(tmp_path / "encoder", kind="xlm-roberta")
    keys = {"rerank__candidates": f"{bucket}/c.jsonl", "rerank__output": f"{bucket}/out"}
    with pytest.raises(ModelError, match="it is an encoder, not a reranker"):
        rerank(settings_for(**keys, rerank__model=str(model)))
