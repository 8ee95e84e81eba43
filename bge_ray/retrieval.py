"""Questions to a data set, answered in this process, without a cluster; see `bge_ray.open_index`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bge_ray.dataset.lookup import ShardMap, read_places
from bge_ray.errors import DatasetMismatchError, ModelError, SettingsError
from bge_ray.index.package import faiss
from bge_ray.index.topk import NO_RESULT, Results, rescore
from bge_ray.model.spec import model_folder, text_feeder
from bge_ray.model.uncollected import uncollected
from bge_ray.pipeline.index.published import index_files, read_index
from bge_ray.pipeline.index.searchers import Searcher
from bge_ray.pipeline.runs.source import Source, open_source
from bge_ray.pipeline.search.stages import ShardSearcher
from bge_ray.records.ids import FloatArray, IdArray
from bge_ray.records.index import IndexDescription
from bge_ray.records.model import EMBEDDING
from bge_ray.settings.sections import OutputSettings, Settings

# Where passages of a list fall together, so many times as many results are asked for.
REFILL = 4


@dataclass(frozen=True)
class Hit:
    """A passage that was found: the inner product with the question, and the columns that were asked for."""

    passage_id: str
    score: float
    vector_id: int
    columns: dict[str, Any]


class IndexReader:
    """A data set that answers questions; not to be used by several threads at once."""

    def __init__(
        self, source: Source, index: IndexDescription | None, model: str | None, device: str
    ) -> None:
        """Take what `open_index_reader` found."""
        self._source, self._index = source, index
        self._model_name, self._device = model, device
        self._shards = ShardMap.of(source.manifest)
        # Threads are the process's own matter; these calls set what is set.
        threads = faiss.omp_get_max_threads()
        self._searcher = (
            ShardSearcher(source.storage, source.root, self._shards.facts, threads)
            if index is None
            else Searcher(source.storage, index_files(source.root, index), threads)
        )
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
        rescored: int = 0,
    ) -> list[list[Hit]]:
        """Find the k best passages for each query.

        Args:
            queries: texts, which are encoded by the data set's model with its instruction for queries; or
                their vectors, (n, dim) float16 or float32 of unit norm.
            k: distinct passages a query, at least 1; fewer come where there are no more.
            columns: of the embedding shards, such as metadata that was kept, to come with each passage.
            rescored: candidates from the index to score again from the stored vectors; 0 for none.

        Returns:
            A list a query, best first, ties by passage id.

        Raises:
            SettingsError: k is below 1.
            ModelError: the model is not to be had or not that of the data set, or a query has no vector.
            IndexBuildError: a vector is of another length or norm, or a file of the index is damaged.
            StorageError: a shard is missing or damaged, or lacks a column.
        """
        if k < 1:
            raise SettingsError(f"k is {k}; at least 1 is needed")
        if isinstance(queries, np.ndarray):
            vectors = queries
        else:
            vectors = self.encode([queries] if isinstance(queries, str) else queries)
        if not len(vectors):
            return []
        asked = max(k, rescored)
        most = self._source.manifest.vectors if self._index is None else self._index.ntotal
        while True:
            scores, ids = self._find(vectors, min(asked, most), rescored)
            places = self._places(ids, columns)
            hits = [_hits(*found, places, k) for found in zip(scores, ids, strict=True)]
            # An index that probes some of its lists may have no more, however much is asked for.
            if asked >= most or all(
                len(row) == k or NO_RESULT in at for row, at in zip(hits, ids, strict=True)
            ):
                return hits
            asked *= REFILL

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Return (n, dim) float32 vectors of n query texts, of unit norm.

        Raises:
            ModelError: see `search`.
        """
        model, feeder = self._loaded()
        tokens = feeder.queries(texts)
        result = model.empty_result(len(tokens))
        model.run(tokens, model.cut(tokens.lengths, model.settle_budget("auto")), result)
        for row, (reason, detail) in sorted(result.faults.items()):
            raise ModelError(f"query {texts[row][:60]!r}: no vector: {reason}, {detail}")
        found: FloatArray = result.array(EMBEDDING)
        return found

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
            model = Model(spec, model_folder(spec), Place(self._device, torch.get_num_threads()))
            feeder = text_feeder(spec)
            check_canaries(self._source.spec.canaries, model, feeder)
            self._encoder = model, feeder
        return self._encoder

    def _find(self, vectors: npt.NDArray[Any], asked: int, rescored: int) -> Results:
        effort = None if self._index is None else self._index.effort
        found: Results = self._searcher.search(vectors, asked, effort)
        if not rescored or self._index is None:
            return found
        known = self._places(found[1], ())["vector_id"].to_numpy()

        def fetch(ids: IdArray) -> npt.NDArray[Any]:
            column = pa.concat_arrays(self._places(ids, (EMBEDDING,))[EMBEDDING].chunks)
            return np.asarray(column.flatten()).reshape(len(ids), self.dim)

        return rescore(vectors, np.where(np.isin(found[1], known), found[1], NO_RESULT), fetch, asked)

    def _places(self, ids: IdArray, columns: Sequence[str]) -> pa.Table:
        wanted = dict.fromkeys(["passage_id", *columns])
        distinct = np.unique(ids[ids != NO_RESULT])
        return read_places(self._source.storage, self._source.root, self._shards, distinct, tuple(wanted))


def open_index_reader(uri: str, *, model: str | None, device: str) -> IndexReader:
    """Open a data set for questions; see `bge_ray.open_index`."""
    source = open_source(Settings(output=OutputSettings(uri=uri)))
    if not source.spec.model.normalize:
        raise SettingsError(f"{uri}: its vectors are not normalised, which a search needs")
    index = read_index(source.storage, source.root)
    if index is not None and index.vector_fingerprint != source.spec.vector_fingerprint:
        raise DatasetMismatchError(f"{uri}: its index is of other vectors; build it again (bge-ray index)")
    return IndexReader(source, index, model, device)


def _hits(scores: FloatArray, ids: IdArray, places: pa.Table, k: int) -> list[Hit]:
    """Return the k best distinct passages of one query."""
    known = places["vector_id"].to_numpy()
    at = np.searchsorted(known, ids)
    there = at < len(known)
    there[there] = known[at[there]] == ids[there]
    best: dict[str, Hit] = {}
    rows = places.take(pa.array(at[there])).to_pylist()
    for row, score in zip(rows, scores[there].tolist(), strict=True):
        hit = Hit(row.pop("passage_id"), score, row.pop("vector_id"), row)
        best.setdefault(hit.passage_id, hit)
    return sorted(best.values(), key=lambda hit: (-hit.score, hit.passage_id))[:k]
