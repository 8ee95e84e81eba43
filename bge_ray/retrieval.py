"""Questions to a data set, answered in this process, without a cluster; see `bge_ray.open_index`."""

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bge_ray.dataset.filters import FilterReader
from bge_ray.dataset.lookup import ShardMap
from bge_ray.dataset.passing import Passing, mark_all
from bge_ray.dataset.read import shard_columns
from bge_ray.errors import ModelError, SettingsError
from bge_ray.formats.rows import refuse_no_query
from bge_ray.index.package import faiss
from bge_ray.index.topk import Results
from bge_ray.model.source import fetch_model
from bge_ray.model.spec import hash_files, text_feeder
from bge_ray.model.uncollected import uncollected
from bge_ray.pipeline.index.published import index_files, read_index
from bge_ray.pipeline.index.searchers import Searcher
from bge_ray.pipeline.runs.holders import Handover, RowHolder
from bge_ray.pipeline.runs.source import Source, open_source
from bge_ray.pipeline.search.exact import ShardSearcher
from bge_ray.pipeline.search.freshness import check_index
from bge_ray.pipeline.search.retrieve import Group, Retrieval, plan_retrieval, retrieve, told_columns
from bge_ray.records.ids import FloatArray
from bge_ray.records.index import IndexDescription
from bge_ray.records.model import EMBEDDING
from bge_ray.records.schemas import SPAN_COLUMNS
from bge_ray.settings.sections import OutputSettings, Settings

logger = logging.getLogger(__name__)

# Of the filters asked for last it is kept which rows pass, a bit a row, in so many bytes.
KEPT_MARKS_BYTES = 256 << 20


@dataclass(frozen=True)
class Hit:
    """A passage that was found: the inner product with the question, and the columns that were asked for.

    Where passages were cut into chunks it was found by chunk ``chunk_no``, which is the characters from
    ``start`` to ``end`` (exclusive) of its text in the corpus; otherwise these are None.
    """

    passage_id: str
    score: float
    vector_id: int
    columns: dict[str, Any]
    chunk_no: int | None = None
    start: int | None = None
    end: int | None = None


class IndexReader:
    """A data set that answers questions; not to be used by several threads at once."""

    def __init__(
        self, source: Source, index: IndexDescription | None, model: str | None, device: str
    ) -> None:
        """Take what `open_index_reader` found."""
        self._source, self._index = source, index
        self._model_name, self._device = model, device
        # Threads are the process's own matter; these calls set what is set.
        self._threads = faiss.omp_get_max_threads()
        self._shards = ShardMap.of(source.manifest)
        # What one question fetched is there for the next.
        self._stored = RowHolder(source.storage, source.root, self._shards)
        self._searchers: dict[bool, Searcher | ShardSearcher] = {}
        self._filters: FilterReader | None = None
        # By their SQL, for the searchers; the last asked for is the last.
        self._passing: OrderedDict[str, Passing] = OrderedDict()
        self._encoder: Any = None

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._source.spec.model.dim

    @property
    def description(self) -> IndexDescription | None:
        """What the index is, with its measured recall; None where the vectors are searched exactly."""
        return self._index

    def search(
        self,
        queries: str | Sequence[str] | npt.NDArray[np.floating[Any]],
        k: int = 10,
        *,
        columns: Sequence[str] = (),
        rescored: int | None = None,
        nprobe: int | None = None,
        group: Group = "passage",
        filter: str | None = None,  # noqa: A002 - what everybody calls it
    ) -> list[list[Hit]]:
        """Find the k best passages for each query.

        Args:
            queries: texts, which are encoded by the data set's model with its instruction for queries; or
                their vectors, (n, dim) float16 or float32 of unit norm.
            k: results a query, at least 1; fewer come where there are no more.
            columns: of the embedding shards, such as metadata that was kept, to come with each passage.
            rescored: candidates from the index to score again from the stored vectors; 0 for none, and None
                for as many as the index was tuned with, as a search job does.
            nprobe: inverted lists to look into (efSearch of a graph); None for as many as were tuned.
            group: what a result is: a distinct "passage", by its best chunk if it was cut, or a "chunk".
            filter: condition in SQL over kept columns, such as "lang = 'de' AND year >= 2020", that results
                must pass: they are the k best of what passes. The first search with it reads these columns;
                where little passes, all of that is compared, and the best are scored exactly.

        Returns:
            A list a query, best first, ties by passage id.

        Raises:
            SettingsError: k or nprobe is below 1, there are no lists for nprobe, the data set has no such
                column, or filter or device are none.
            ModelError: the model is not to be had or not that of the data set, or a query has no vector: one
                of nothing but white space has none.
            IndexBuildError: a vector is of another length or norm, or a file of the index is damaged.
            StorageError: a shard is missing or damaged.
        """
        if not isinstance(k, int | np.integer) or k < 1:
            raise SettingsError(f"k is {k!r}; a whole number from 1 on is needed")
        self._check_effort(nprobe)
        known = shard_columns(self._source.spec)
        for name in columns:
            if name not in known:
                there = ", ".join(sorted(known))
                raise SettingsError(
                    f"column {name!r}: {self._source.root} has none of that name, only {there}"
                )
        sql = None if filter is None else self._settled(filter)
        if isinstance(queries, np.ndarray):
            vectors = queries
        else:
            vectors = self.encode([queries] if isinstance(queries, str) else queries)
        if not len(vectors):
            return []
        if rescored is None:
            rescored = 0 if self._index is None else self._index.rescored(k)
        how = plan_retrieval(
            self._source, self._index, k, rescored, group=group, effort=nprobe, columns=columns
        )
        hits: list[list[Hit]] = [[] for _ in vectors]
        if sql is not None:
            how = how.among(self._passing[sql].passes)
            if not how.k:
                return hits
        searcher = self._searcher(how)

        def search(asked: FloatArray, fetched: int, effort: int | None) -> Results:
            return searcher.search(asked, fetched, effort, sql)

        found = retrieve(vectors, search, how, self._stored)
        rows = zip(found.numbers.tolist(), found.scores.tolist(), found.rows.to_pylist(), strict=True)
        for number, score, row in rows:
            span = {name: row.get(name) for name in SPAN_COLUMNS}
            asked = {name: row[name] for name in columns}
            hits[number].append(Hit(row["passage_id"], score, row["vector_id"], asked, **span))
        return hits

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Return (n, dim) float32 vectors of n query texts, of unit norm.

        Raises:
            ModelError: see `search`.
        """
        for text in texts:
            refuse_no_query(text)
        model, feeder = self._loaded()
        tokens = feeder.queries(texts)
        result = model.empty_result(len(tokens))
        model.run(tokens, model.cut(tokens, model.settle_budget("auto")), result)
        for row, (reason, detail) in sorted(result.faults.items()):
            raise ModelError(f"query {texts[row][:60]!r}: no vector: {reason}, {detail}")
        found: FloatArray = result.array(EMBEDDING)
        return found

    def _check_effort(self, nprobe: int | None) -> None:
        if nprobe is None:
            return
        if nprobe < 1:
            raise SettingsError(f"nprobe is {nprobe}; at least 1 is needed")
        if self._index is None or self._index.parameter is None:
            what = "no index" if self._index is None else f"an index {self._index.factory} without lists"
            raise SettingsError(
                f"nprobe is {nprobe}: {self._source.root} has {what}; all vectors are compared, leave it out"
            )

    def _settled(self, text: str) -> str:
        """Settle which rows pass a filter, unless that is known, and return its SQL."""
        source = self._source
        try:
            if self._filters is None:
                self._filters = FilterReader(source.spec, source.root)
            found = self._filters.read(text)
        except SettingsError as error:
            raise SettingsError(f"filter {text!r}: {error}") from error
        if found.sql not in self._passing:
            passing = mark_all(source.storage, source.root, self._shards, [found])[found.sql]
            if isinstance(passing, str):
                raise SettingsError(f"filter {text!r}: {passing}")
            self._passing[found.sql] = passing
        self._passing.move_to_end(found.sql)
        while (
            len(self._passing) > 1 and sum(len(one.bits) for one in self._passing.values()) > KEPT_MARKS_BYTES
        ):
            self._passing.popitem(last=False)
        return found.sql

    def _searcher(self, how: Retrieval) -> Searcher | ShardSearcher:
        """Return what holds the index, or the vectors for an exact search of rows or of chunks."""
        per_row = how.per_row and self._index is None
        if per_row not in self._searchers:
            storage, root = self._source.storage, self._source.root
            self._searchers[per_row] = (
                ShardSearcher(
                    storage,
                    root,
                    self._shards,
                    self._threads,
                    per_row=per_row,
                    filters=self._passing,
                    handover=Handover(self._stored, told_columns(self._source)),
                )
                if self._index is None
                else Searcher(storage, index_files(root, self._index), self._threads, self._passing)
            )
        return self._searchers[per_row]

    @uncollected()
    def _loaded(self) -> Any:
        if self._encoder is None:
            import torch  # seconds, and nobody who has vectors needs it

            from bge_ray.model.canary import check_canaries
            from bge_ray.model.run.model import Model, Place

            spec = self._source.spec.model.only(EMBEDDING).stored_as("float32")
            if self._model_name is not None:
                spec = dataclasses.replace(spec, name=self._model_name, revision=None)
            if self._device == "cpu":
                # Half precision is for GPUs; the same weights give the same directions in float32.
                spec = dataclasses.replace(spec, dtype="float32")
            _check_device(self._device)
            folder, _ = fetch_model(spec.name, spec.revision, "model")
            if hash_files(spec, folder) != spec.weights_sha256:
                raise ModelError(
                    f"model {spec.name}: its files differ from those of {self._source.spec.model.name} that "
                    f"{self._source.root} was embedded with; questions need the same model"
                )
            model = Model(spec, folder, Place(self._device, torch.get_num_threads()))
            feeder = text_feeder(spec)
            check_canaries(self._source.spec.canaries, model, feeder)
            self._encoder = model, feeder
        return self._encoder


def _check_device(device: str) -> None:
    """Refuse a device that is none, or that this process cannot use.

    Raises:
        SettingsError: torch knows no such device.
        ModelError: torch sees no GPU.
    """
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise SettingsError(f"device {device!r}: torch knows none of that name; take cpu or cuda") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device!r}: torch sees no GPU here; take cpu, which is the default")


def open_index_reader(uri: str, *, model: str | None, device: str, stale_index: bool) -> IndexReader:
    """Open a data set for questions; see `bge_ray.open_index`."""
    source = open_source(Settings(output=OutputSettings(uri=uri)))
    made = [output.name for output in source.spec.model.outputs]
    if EMBEDDING not in made:
        raise SettingsError(f"{uri}: has no output {EMBEDDING}, only {', '.join(made)}; questions need it")
    if not source.spec.model.normalize:
        raise SettingsError(f"{uri}: its vectors are not normalised, which a search needs")
    index = read_index(source.storage, source.root)
    if index is not None:
        way_out = "open it with stale_index=True (bge-ray ask --stale-index)"
        check_index(index, source, allowed=stale_index, way_out=way_out)
        if shortfall := index.shortfall(index.k, index.rescore):
            more = (
                f", {shortfall.rescored:.4f} with rescored={shortfall.rescore}" if shortfall.rescore else ""
            )
            logger.warning("%s: passages are missed: %s%s", uri, shortfall, more)
    return IndexReader(source, index, model, device)
