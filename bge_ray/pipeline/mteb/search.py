"""Retrieval and reranking tasks of mteb through our own jobs: embed, index, search, rerank, on one cluster.

What a task takes lies in a work folder of its own, under names of what it is made of: another contestant, or
a run after a crash, finds there what is done.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bge_ray.dataset.reader import open_reader
from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.pipeline.index.job import build_index
from bge_ray.pipeline.mteb.contestants import Encoder, Entrant
from bge_ray.pipeline.mteb.encode import Encoders
from bge_ray.pipeline.mteb.texts import (
    queries_of,
    read_results,
    write_candidates,
    write_corpus,
    write_queries,
)
from bge_ray.pipeline.rerank.job import rerank
from bge_ray.pipeline.search.job import search
from bge_ray.records.canonical import digest
from bge_ray.settings.sections import CorpusSettings, Settings
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.sweep import remove_empty_folders

logger = logging.getLogger(__name__)

LETTERS = 16
# Below the work folder, a folder a task, split and subset, and in it what is put there and what jobs make.
_OWN = re.compile(
    r"/work/[0-9a-f]{16}/(queries\.parquet|corpus/\d{6}\.parquet|candidates-[0-9a-f]{16}\.parquet|"
    r"(data|run|reranked)-[0-9a-f]{16}/.+)$"
)
# What jobs keep in their folders for themselves, which no listing shows.
_OUTPUT = re.compile(r".*/work/[0-9a-f]{16}/(?:data|run|reranked)-[0-9a-f]{16}(?=/)")
_HIDDEN = ("_bge_ray.json", "_retired.json", "index/_bge_ray.json", "index/_retired.json")

Results = dict[str, dict[str, float]]


@dataclass
class Desk:
    """What all retrieval tasks of a run share.

    ``settings`` are those of the run, ``work`` the URI below which tasks work. ``left_out`` counts by task
    the passages without a vector and the queries without a result.
    """

    settings: Settings
    storage: Storage
    work: str
    stop: StopRequest
    watch: Callable[[], None]
    left_out: Counter[str] = field(default_factory=Counter)

    def clean(self) -> None:
        """Remove all that tasks, and the jobs that they ran, have put there."""
        found = [info.uri for info in self.storage.list_files(self.work) if _OWN.search(info.uri)]
        outputs = {match[0] for uri in found if (match := _OUTPUT.match(uri))}
        # The journals last: they say of the other files that they are ours.
        self.storage.delete(found)
        hidden = [join(output, name) for output in sorted(outputs) for name in _HIDDEN]
        self.storage.delete(uri for uri in hidden if self.storage.info(uri) is not None)
        remove_empty_folders(self.storage, self.work)


class JobSearch:
    """What mteb takes for a search: it writes the corpus down, runs our jobs on it, and reads their runs."""

    def __init__(self, meta: Any, entrant: Entrant, desk: Desk) -> None:
        """Take the contestant; nothing is done before mteb asks."""
        self.mteb_model_meta = meta
        self._entrant, self._desk = entrant, desk
        self._corpus: Any = None

    def index(self, corpus: Any, **_: Any) -> None:
        """Note the corpus; whether it is needed whole, the search knows."""
        self._corpus = corpus

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **_: Any,
    ) -> Results:
        """Return the scores of the best passages of each query, or of its candidates where these are given.

        Args:
            queries: a table with id, text and what belongs to it.
            task_metadata: of the task.
            hf_split: of its data.
            hf_subset: of its data.
            top_k: results a query.
            top_ranked: the candidates of each query; None: all passages are.
        """
        asked = queries_of(queries)
        place = digest(task_metadata.name, task_metadata.revision, hf_split, hf_subset)[:LETTERS]
        home = join(self._desk.work, place)
        found: Results = {query_id: {} for query_id in asked}
        entrant = self._entrant
        if top_ranked is not None and entrant.reranker is not None:
            pairs = self._scored(home, asked, top_ranked)
        elif entrant.encoder is None:
            raise AssertionError(
                f"{entrant.name}: a reranker alone has no candidates in {task_metadata.name}"
            )
        else:
            data = self._embedded(home, entrant.encoder, task_metadata)
            instruction = entrant.encoder.rules.instruction(task_metadata, "query")
            if top_ranked is not None:
                return _of_candidates(self._desk, entrant.encoder, data, asked, top_ranked, instruction)
            pairs = read_results(self._desk.storage, self._searched(home, data, asked, instruction, top_k))
        for query_id, passage_id, score in pairs:
            found[query_id][passage_id] = score
        silent = sum(not results for results in found.values())
        self._leave_out(task_metadata.name, silent, "queries without a result")
        return found

    def _leave_out(self, task: str, count: int, what: str) -> None:
        if count:
            logger.warning("%s, %s: %d %s", task, self._entrant.name, count, what)
            self._desk.left_out[task] += count

    def _embedded(self, home: str, encoder: Encoder, metadata: Any) -> Settings:
        """Embed the corpus; return the settings that name the data set."""
        desk, document = self._desk, encoder.rules.instruction(metadata, "document")
        write_corpus(desk.storage, join(home, "corpus"), self._corpus)
        model = encoder.asked.model_copy(update={"normalize": True, "passage_instruction": document})
        made = digest(model.model_dump(mode="json"), encoder.spec.weights_sha256, encoder.spec.dtype)
        uri = join(home, f"data-{digest(made, desk.settings.chunking.model_dump(mode='json'))[:LETTERS]}")
        settings = desk.settings.model_copy(
            update={
                "corpus": CorpusSettings(
                    uri=join(home, "corpus"), id_column="id", title_column=None, max_rejected_fraction=1.0
                ),
                "model": model,
                "output": desk.settings.output.model_copy(update={"uri": uri}),
                "index": desk.settings.index.model_copy(update={"build": False}),
            }
        )
        rejected = embed(settings, desk.stop).manifest.rows_rejected
        self._leave_out(metadata.name, rejected, "passages without a vector")
        return settings

    def _searched(
        self, home: str, data: Settings, queries: Mapping[str, str], instruction: str, top_k: int
    ) -> str:
        """Search, and rerank where there is a reranker; return the folder of the run."""
        desk, entrant = self._desk, self._entrant
        by_index = entrant.search == "index"
        if by_index:
            build_index(data, desk.stop)
        uri = join(home, "queries.parquet")
        write_queries(desk.storage, uri, queries)
        key = digest(data.output.uri, instruction, top_k, entrant.search)[:LETTERS]
        rescored = desk.settings.search.rescore
        asked = desk.settings.search.model_copy(
            update={
                "queries": uri,
                "id_column": "id",
                "text_column": "text",
                "output": join(home, f"run-{key}"),
                "k": top_k,
                "exact": not by_index,
                "rescore": rescored and max(rescored, top_k),
                "rerank": False,
                "group": "passage",
                "max_rejected_fraction": 1.0,
            }
        )
        model = data.model.model_copy(update={"query_instruction": instruction})
        settings = data.model_copy(update={"search": asked, "model": model})
        search(settings, desk.stop)
        if entrant.reranker is None:
            return str(asked.output)
        output = join(home, f"reranked-{digest(key, entrant.revision)[:LETTERS]}")
        self._rerank(settings, str(asked.output), output)
        return output

    def _rerank(self, settings: Settings, candidates: str, output: str, depth: int | None = None) -> None:
        asked = self._entrant.reranking
        if asked is None:
            raise AssertionError(f"{self._entrant.name}: has no reranker")
        changes = {
            "candidates": candidates,
            "output": output,
            "depth": depth or asked.depth,
            "max_rejected_fraction": 1.0,
        }
        rerank(settings.model_copy(update={"rerank": asked.model_copy(update=changes)}), self._desk.stop)

    def _scored(self, home: str, queries: Mapping[str, str], ranked: Mapping[str, Sequence[str]]) -> Any:
        """Score the candidates that are given, by a reranker; return its pairs."""
        desk, key = self._desk, digest("given", self._entrant.revision)[:LETTERS]
        uri = join(home, f"candidates-{digest('candidates')[:LETTERS]}.parquet")
        write_candidates(desk.storage, uri, queries, ranked, self._corpus)
        output = join(home, f"reranked-{key}")
        settings = desk.settings.model_copy(
            update={
                "corpus": CorpusSettings(),
                "search": desk.settings.search.model_copy(update={"queries": None, "output": None}),
                "output": desk.settings.output.model_copy(update={"uri": None}),
            }
        )
        # rerank.depth is for what a search found; here all candidates count.
        self._rerank(settings, uri, output, max(1, *map(len, ranked.values())))
        return read_results(desk.storage, output)


def _of_candidates(
    desk: Desk,
    encoder: Encoder,
    data: Settings,
    queries: Mapping[str, str],
    ranked: Mapping[str, Sequence[str]],
    instruction: str,
) -> Results:
    """Score candidates that are given by the cosine of the stored vectors, in one pass over them.

    Memory: the vectors of the queries, and a score a pair.
    """
    encoders = Encoders(data, encoder.spec, desk.watch)
    try:
        vectors = encoders.encode(list(queries.values()), instruction, are_queries=True)
    finally:
        encoders.stop()
    asking: dict[str, list[int]] = {}
    for number, query_id in enumerate(queries):
        for passage_id in ranked.get(query_id, ()):
            asking.setdefault(passage_id, []).append(number)
    names = list(queries)
    found: Results = {query_id: {} for query_id in names}
    for batch in open_reader(str(data.output.uri)).batches(columns=()):
        desk.watch()
        rows = [
            (row, passage_id)
            for row, passage_id in enumerate(batch.passage_ids.to_pylist())
            if passage_id in asking
        ]
        for row, passage_id in rows:
            numbers = asking[passage_id]
            scores = vectors[numbers] @ batch.vectors[row].astype(np.float32)
            for number, score in zip(numbers, scores.tolist(), strict=True):
                # Of a passage in chunks the best one counts.
                best = found[names[number]].get(passage_id)
                found[names[number]][passage_id] = score if best is None else max(best, score)
    return found
