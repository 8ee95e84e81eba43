"""The user's own queries for measuring recall: texts from a file, encoded like the passages."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from bge_ray.errors import CorpusError, ModelError
from bge_ray.formats.queries import read_queries
from bge_ray.model.run.batching import CPU_TOKEN_BUDGET
from bge_ray.model.spec import asked_of_queries, for_trial, model_folder, text_feeder
from bge_ray.pipeline.engine.tasks import run_tasks
from bge_ray.records.canonical import digest
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.ids import FloatArray
from bge_ray.records.model import EMBEDDING
from bge_ray.settings.sections import ModelSettings, Settings
from bge_ray.storage.objects import Storage

# What one encoder on a CPU takes, large models included.
ENCODER_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Queries:
    """Texts of a query file, and a hash of them."""

    uri: str
    sha256: str
    texts: tuple[str, ...]


def given_queries(storage: Storage, settings: Settings) -> Queries | None:
    """Read the user's own queries, index.num_queries at most; None where no index.queries are named.

    Their columns are those of search.queries.

    Raises:
        CorpusError: the file cannot be read, or holds no query.
    """
    uri = settings.index.queries
    if uri is None:
        return None
    batches = read_queries(storage, uri, settings.search.id_column, settings.search.text_column)
    every = (text for batch in batches for text in batch.texts)
    texts = tuple(itertools.islice(every, settings.index.num_queries))
    if not texts:
        raise CorpusError(f"index.queries {uri}: holds no query")
    return Queries(uri, digest(list(texts)), texts)


def encode_given(
    queries: Queries, dataset: DatasetSpec, settings: ModelSettings, watch: Callable[[], None]
) -> FloatArray:
    """Encode queries with the instruction and the model of the data set, in a Ray task.

    Args:
        queries: n texts.
        dataset: whose model it is, with the instruction that its run settled on.
        settings: says whether remote code may be run, and another instruction if one is wanted.
        watch: called while waiting.

    Returns:
        (n, dim) float32 of unit norm.

    Raises:
        ModelError: the model is not to be had, is another than that of the data set, or a query has no
            vector.
    """
    [(_, vectors)] = run_tasks(
        encode_task, [(queries.texts, dataset, settings)], at_once=1, watch=watch, memory_bytes=ENCODER_BYTES
    )
    found: FloatArray = vectors
    return found


def encode_task(texts: tuple[str, ...], dataset: DatasetSpec, settings: ModelSettings) -> FloatArray:
    """Encode query texts on a CPU; see `encode_given`."""
    from bge_ray.model.canary import check_canaries  # torch, only where there is a model
    from bge_ray.model.run.model import Model, Place

    spec = asked_of_queries(dataset.model.only(EMBEDDING), settings)
    folder = model_folder(spec)
    # Half precision is for GPUs; on a CPU the same weights give the same directions in float32.
    spec = for_trial(spec, folder)
    trust = settings.trust_remote_code
    feeder = text_feeder(spec, trust_remote_code=trust)
    model = Model(spec, folder, Place(trust_remote_code=trust))
    check_canaries(dataset.canaries, model, feeder)
    tokens = feeder.queries(texts)
    result = model.empty_result(len(tokens))
    model.run(tokens, model.cut(tokens, CPU_TOKEN_BUDGET), result)
    if result.faults:
        number, (reason, detail) = next(iter(sorted(result.faults.items())))
        raise ModelError(f"index.queries: query {number} has no vector: {reason} {detail}")
    vectors: FloatArray = result.array(EMBEDDING)
    return vectors
