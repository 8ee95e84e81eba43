"""Facts and reports of small runs, with hostile text wherever a page shows text of the user's."""

import dataclasses
from typing import Any

from bge_ray.records.dataset import FileFact
from bge_ray.records.index import CurvePoint, IndexDescription, Recall, TrainedOn
from bge_ray.records.model import ModelSpec
from bge_ray.records.outputs import Output
from bge_ray.records.reports import (
    Contestant,
    EmbedReport,
    Gaps,
    HeldOut,
    HeldOutFigures,
    IndexReport,
    Mean,
    MergedModel,
    MergeReport,
    MinedExample,
    MineReport,
    MtebReport,
    RerankReport,
    Scoring,
    SearchedIndex,
    SearchReport,
    TaskScore,
    TrainReport,
    TrainStep,
)
from bge_ray.records.sparse import Pruning, SparseChoice
from bge_ray.report.facts import Receipt, RunFacts, Workers, read_receipt, summarise, text_lengths
from bge_ray.settings.sections import Settings

EDGES = (8, 16)
HOSTILE = "<script>alert('x')</script>"
MODEL = ModelSpec(
    HOSTILE,
    None,
    "f",
    "dense",
    (Output("embedding", "dense", 8, "float32"),),
    "cls",
    16,
    True,
    "float32",
    "",
    "",
)
ENDED = 140.0


def receipt(n: int, start: float, end: float) -> Receipt:
    """A unit of n + 1 rows as the stages of an embed run note it; one row has no text."""
    example = {"passage_id": HOSTILE, "reason": "empty_text", "detail": HOSTILE, "uri": HOSTILE, "row": 3}
    noted: dict[str, Any] = {"read_s": 1.0, "tokenise_s": 2.0, "write_s": 0.5, "written": end + 1}
    noted |= {"encode_started": start, "encode_ended": end, "device_s": end - start, "waited_s": 1.0}
    noted |= {"padded_tokens": 12 * n, "lengths": [n, 0, 0], "text_bytes": 50 * n, "memory_splits": 0}
    noted |= {"rows_out": n, "tokens": 10 * n, "truncated": 2, "reasons": {"empty_text": 1}, "bytes_out": 100}
    return read_receipt(n + 1, noted | {"rejected_examples": [example], "encoder": "host:7"})


def facts_of_two(job: str = "embed") -> RunFacts:
    """Two units done: at work from 110 to 130, by two encoders; launched at 100, entered at 101."""
    facts = RunFacts(job, "run-7", started=100.0, entered=101.0, length_edges=EDGES)
    facts.plan(units=2, rows=42)
    model = "encoders" if job in ("embed", "index") else "rerankers"
    facts.start(Workers("cpu", 2.0, {model: 2, "readers": 1, "writers": 1}, model), 104.0)
    facts.book(receipt(10, 110.0, 120.0))
    facts.book(receipt(30, 115.0, 130.0))
    return facts


def common(facts: RunFacts, **changes: Any) -> dict[str, Any]:
    given = {**summarise(facts, ended=ENDED, price_per_hour=3.6), "key": "k", "complete": True}
    given |= {"outcome": "complete", "files": (), "settings": Settings().model_dump(mode="json")}
    return given | changes


def embed_report(facts: RunFacts | None = None, **changes: Any) -> EmbedReport:
    facts = facts or facts_of_two()
    report = EmbedReport(
        **common(facts),
        output="s3://b/out",
        corpus="s3://b/in",
        plan=1,
        model=MODEL,
        vector_fingerprint="f",
        readers_busy=0.3,
        lengths=text_lengths(facts),
        objects_removed=0,
        rows_removed=0,
        removed_uris=(),
        output_bytes={"embedding": 32.0},
    )
    return dataclasses.replace(report, **changes)


def index_description(**changes: Any) -> IndexDescription:
    recall = Recall(10, 0.96, 0.95, 0.97)
    index = IndexDescription(
        inputs="k",
        vector_fingerprint="f",
        factory=HOSTILE,
        kind="ivf",
        metric="l2",
        dim=8,
        ntotal=100,
        nlist=8,
        files=(FileFact("a/index.faiss", 1000, "f", 100),),
        shards=("0" * 16,),
        training=TrainedOn("trained/f.faiss", "f"),
        parts=("parts/f.part",),
        parameter="nprobe",
        effort=2,
        recall_target=0.95,
        k=10,
        rescore=0,
        reached=True,
        queries=HOSTILE,
        num_queries=10,
        recall={"@10": recall},
        recall_of_codes={"@10": recall},
        ceiling={"@10": recall},
        ceiling_queries=10,
        recall_after_exact_reranking=recall,
        reranked_candidates=100,
        gain_of_exact_reranking=0.0,
        curve=(CurvePoint(1, {"@10": 0.9}), CurvePoint(2, {"@10": 0.96})),
        imbalance=1.2,
        drift=0.0,
        seconds=5.0,
    )
    return dataclasses.replace(index, **changes)


def index_report(**changes: Any) -> IndexReport:
    index = index_description(**changes)
    return IndexReport(**common(facts_of_two("index"), files=index.files), output="s3://b/out", index=index)


SCORING = Scoring({"name": HOSTILE}, 40, 2, 4000, 0, 0.05, 400.0, 2, 0.9)


def searched_index(**changes: Any) -> SearchedIndex:
    index = SearchedIndex(
        factory=HOSTILE,
        kind="ivf",
        ntotal=100,
        parameter="nprobe",
        effort=2,
        tuned_effort=2,
        rescore=0,
        tuned_k=10,
        tuned_rescore=0,
        lacking_shards=0,
        recall={"@10": Recall(10, 0.96, 0.95, 0.97)},
    )
    return dataclasses.replace(index, **changes)


def sparse_choice(**changes: Any) -> SparseChoice:
    recall = Recall(10, 0.96, 0.92, 0.98)
    choice = SparseChoice(
        0.95, True, Pruning(8, 0.9), 200, recall, exact_ms=9.0, approximate_ms=2.0, build_s=4.0
    )
    return dataclasses.replace(choice, **changes)


def search_report(**changes: Any) -> SearchReport:
    report = SearchReport(
        **common(facts_of_two("search"), steady_s=70.0),
        units=2,
        without_trec=(),
        queries=HOSTILE,
        dataset="s3://b/out",
        model=MODEL,
        index=searched_index(),
        k=10,
        queries_in=10,
        queries_out=9,
        results=90,
        unknown_ids=0,
        missing_results=0,
        doubled_passages=0,
        refilled_queries=0,
        query_tokens=100,
        truncated_queries=0,
        scoring=SCORING,
    )
    return dataclasses.replace(report, **changes)


def rerank_report(**changes: Any) -> RerankReport:
    report = RerankReport(
        **common(facts_of_two("rerank"), steady_s=70.0),
        units=2,
        without_trec=(),
        candidates=HOSTILE,
        queries=9,
        pairs_in=42,
        pairs_out=40,
        lists_rejected=0,
        scoring=SCORING,
    )
    return dataclasses.replace(report, **changes)


VERDICTS = {"positive": 10, "same_text": 1, "copy_by_words": 2, "margin": 7, "not_drawn": 60, "negative": 30}


def mine_report(**changes: Any) -> MineReport:
    example = MinedExample(
        "margin", HOSTILE, HOSTILE, HOSTILE, HOSTILE, 0.9, HOSTILE, HOSTILE, 0.89, 0.5, 0.25
    )
    every = ("copy_by_vector", "max_score", "skipped", "teacher_margin")
    report = MineReport(
        **common(facts_of_two("mine")),
        units=2,
        queries=HOSTILE,
        dataset="s3://b/out",
        model=MODEL,
        exact=True,
        teacher=None,
        queries_in=12,
        queries_out=10,
        queries_short=1,
        queries_unjudged=5,
        positives_unknown=2,
        positives_beyond=1,
        negatives=30,
        tuples=9,
        verdicts=VERDICTS | dict.fromkeys(every, 0),
        examples=(example,),
        gaps=Gaps((0.05, 0.1), (10, 15, 5)),
    )
    return dataclasses.replace(report, **changes)


def merge_report(**changes: Any) -> MergeReport:
    report = MergeReport(
        **common(RunFacts("merge", "run-7", started=100.0, entered=101.0)),
        output=HOSTILE,
        models=(MergedModel(HOSTILE, None, "abc", 0.25, 1.5), MergedModel("b", "rev", "def", 0.75, None)),
        examples=4,
        parameters=22_713_216,
    )
    return dataclasses.replace(report, **changes)


def train_report(**changes: Any) -> TrainReport:
    report = TrainReport(
        **common(facts_of_two("train")),
        output=HOSTILE,
        kind="embedder",
        model=MODEL,
        fresh_head=False,
        data=HOSTILE,
        data_sha256="fed",
        examples=640,
        left_out=3,
        held_out="held_out.jsonl",
        steps=20,
        batch_queries=32,
        restarts=1,
        resumed_from=10,
        curve=tuple(TrainStep(step, 5 / step, 1e-5) for step in range(1, 21)),
        figures=HeldOutFigures(
            200, HeldOut(0.25, 0.2, 0.3), HeldOut(0.5, 0.45, 0.55), HeldOut(0.25, 0.21, 0.29), 0.0001
        ),
    )
    return dataclasses.replace(report, **changes)


def mteb_report(**changes: Any) -> MtebReport:
    """Two contestants of whom one did one of two tasks."""
    one, two = f"{HOSTILE} aa", "b+cross bb"
    report = MtebReport(
        **common(facts_of_two("mteb")),
        output=HOSTILE,
        rules="baai",
        mteb_version="2.26.24",
        contestants=(
            Contestant(HOSTILE, "aa", HOSTILE, None, "exact", "float32", 512, HOSTILE),
            Contestant("b+cross", "bb", "b", "cross", "exact", "float16", 1024),
        ),
        results=(
            TaskScore(one, "SciFact", "Retrieval", 0.71234, 12.0, "2.26.24"),
            TaskScore(one, "STS12", "STS", 0.5, 3.0, "2.26.24"),
            TaskScore(two, "SciFact", "Retrieval", 0.75, None, None),
        ),
        means=(
            Mean("MTEB(eng, v1), 56 tasks", one, None, 56, 2, None, 62.17),
            Mean("MTEB(eng, v1), 56 tasks", one, "STS", 10, 10, 81.5, 81.59),
            Mean("MTEB(eng, v1), 56 tasks", two, "STS", 10, 10, 81.5, None),
        ),
        left_out={"SciFact": 1234},
    )
    return dataclasses.replace(report, **changes)
