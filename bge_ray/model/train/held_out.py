"""How well a model finds the positives of held-out queries, run as `embed` and `rerank` run it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bge_ray.errors import ModelError
from bge_ray.metrics import measure
from bge_ray.model.feed.pairs import PairFeeder
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import family_of
from bge_ray.model.train.batches import TextTokens
from bge_ray.model.train.examples import Group, HeldOutQuery
from bge_ray.records.ids import FloatArray
from bge_ray.records.model import EMBEDDING, SCORE, ModelSpec
from bge_ray.records.tokens import PackedTokens

CUT = 10
KEPT = 100
# Queries compared with all texts at once.
QUERIES_AT_ONCE = 256


def measure_held_out(
    spec: ModelSpec, folder: Path, place: Place, examples: Sequence[HeldOutQuery]
) -> dict[str, float]:
    """Return MRR@10 by query id.

    An embedder ranks all different texts of all examples; a reranker ranks those of each query's own line.

    Args:
        spec: of the model.
        folder: its files.
        place: where it runs.
        examples: whose positives are to be found; a reranker's have negatives.

    Raises:
        ModelError: the model makes nothing of a text.
    """
    model = Model(spec, folder, place)
    feeder = family_of(spec).feeder(spec, folder, trust_remote_code=place.trust_remote_code)
    if isinstance(feeder, PairFeeder):
        run = _rerank(model, feeder, examples)
    else:
        run = _search(model, feeder, _queries(model, folder, place, examples), examples)
    qrels = {example.query_id: dict.fromkeys(example.positives, 1) for example in examples}
    names = _names(examples)
    named = {query: {names[text]: score for text, score in found.items()} for query, found in run.items()}
    judged = {query: {names[text]: 1 for text in texts} for query, texts in qrels.items()}
    return measure(named, judged, (CUT,))[f"MRR@{CUT}"]


def _names(examples: Sequence[HeldOutQuery]) -> dict[str, str]:
    texts = dict.fromkeys(text for e in examples for text in (*e.positives, *e.negatives))
    return {text: f"{number:09d}" for number, text in enumerate(texts)}


def _search(
    model: Model, feeder: TextFeeder, queries: FloatArray, examples: Sequence[HeldOutQuery]
) -> dict[str, dict[str, float]]:
    texts = list(_names(examples))
    passages = _unit(_run(model, feeder.passages(texts), EMBEDDING))
    found: dict[str, dict[str, float]] = {}
    for start in range(0, len(examples), QUERIES_AT_ONCE):
        scores = queries[start : start + QUERIES_AT_ONCE] @ passages.T
        kept = np.argsort(-scores, axis=1, kind="stable")[:, :KEPT]
        for number, places in enumerate(kept):
            row = {texts[place]: float(scores[number, place]) for place in places}
            found[examples[start + number].query_id] = row
    return found


def _queries(model: Model, folder: Path, place: Place, examples: Sequence[HeldOutQuery]) -> FloatArray:
    """Return (n, dim) unit vectors of the queries, each behind its own prompt if it has one."""
    length = model.spec.max_length
    tokens = TextTokens(model.spec, folder, (length, length), trusted=place.trust_remote_code)
    groups = [Group(e.query, e.prompt, [], None) for e in examples]
    return _unit(_run(model, tokens.queries(groups), EMBEDDING))


def _rerank(
    model: Model, feeder: PairFeeder, examples: Sequence[HeldOutQuery]
) -> dict[str, dict[str, float]]:
    lists = [list(dict.fromkeys([*example.positives, *example.negatives])) for example in examples]
    queries = [e.query for e, texts in zip(examples, lists, strict=True) for _ in texts]
    scores = iter(
        _run(model, feeder.pairs(queries, [text for texts in lists for text in texts]), SCORE).tolist()
    )
    return {
        example.query_id: {text: float(next(scores)) for text in texts}
        for example, texts in zip(examples, lists, strict=True)
    }


def _run(model: Model, tokens: PackedTokens, output: str) -> FloatArray:
    result = model.empty_result(len(tokens))
    model.run(tokens, model.cut(tokens, model.settle_budget("auto")), result)
    if result.faults:
        raise ModelError(
            f"train.held_out: {model.spec.name} makes nothing of {len(result.faults)} of its texts"
        )
    return result.array(output).astype(np.float32)


def _unit(vectors: FloatArray) -> FloatArray:
    unit: FloatArray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
