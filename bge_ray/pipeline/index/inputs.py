"""What decides an index: the data set, the factory, the queries; checked before anything is built."""

import re
from dataclasses import dataclass

from bge_ray.dataset.folder import Dataset
from bge_ray.errors import DatasetMismatchError, IndexBuildError, SettingsError
from bge_ray.index.choice import Choice, Wish, choose
from bge_ray.index.factory import IndexSpec, Metric, check_factory, choose_nlist
from bge_ray.model.spec import asked_of_queries
from bge_ray.pipeline.index.published import FOLDER
from bge_ray.pipeline.index.queries import Queries, given_queries
from bge_ray.pipeline.index.steps import key_of, read_training
from bge_ray.records.dataset import DatasetSpec, Manifest
from bge_ray.records.index import INDEX_FORMAT_VERSION
from bge_ray.records.model import EMBEDDING
from bge_ray.settings.sections import Settings
from bge_ray.storage.objects import Storage, join

# Deeper results are measured no more: a query's true results must be held, and searched for again and again.
MAX_TUNED_K = 1000


@dataclass(frozen=True)
class Inputs:
    """All that decides an index, checked; ``key`` is a name for it.

    ``k`` and ``rescore`` are what searches will ask for: results, and candidates to score again, if any;
    ``per_row`` says that a result is a passage, by the best of its chunks.
    ``choice`` says what an auto factory was chosen from.
    """

    dataset: DatasetSpec
    manifest: Manifest
    spec: IndexSpec
    k: int
    rescore: int
    per_row: bool
    choice: Choice | None
    queries: Queries | None
    key: str


def read_inputs(dataset: Dataset, settings: Settings) -> Inputs:
    """Read what the index of a data set is made from, and check that it can be made.

    Raises:
        SettingsError, CorpusError, DatasetMismatchError: it cannot.
    """
    there, manifest = dataset.read_spec(), dataset.read_manifest()
    name = f"output.uri {dataset.root}"
    if there is None or manifest is None:
        raise SettingsError(f"{name}: no complete data set there; run bge-ray embed first")
    if manifest.vector_fingerprint != there.vector_fingerprint:
        raise DatasetMismatchError(
            f"{name}: its manifest is of another data set ({manifest.vector_fingerprint[:12]}) than its "
            f"dataset.json ({there.vector_fingerprint[:12]}); run bge-ray embed again"
        )
    if not manifest.vectors:
        raise SettingsError(f"{name}: the data set has no vectors")
    asked, k = settings.index, asked_k(settings)
    trained = trained_factory(dataset.storage, dataset.root)
    spec, rescore, choice = settle_spec(there, manifest.vectors, settings, trained)
    per_row = there.chunking is not None and settings.search.group == "passage"
    queries = given_queries(dataset.storage, settings)
    key = key_of(
        INDEX_FORMAT_VERSION,
        manifest.vector_fingerprint,
        spec.factory,
        spec.metric.value,
        asked.layout,
        asked.range_bytes,
        asked.recall_target,
        k,
        rescore,
        asked.max_drift,
        asked.num_queries,
        [queries.sha256, *asked_of_queries(there.model, settings.model).query_key()] if queries else None,
        [m.embeddings.sha256 for m in manifest.shards if m.embeddings is not None],
        *(["passages"] if per_row else []),
    )
    return Inputs(there, manifest, spec, k, rescore, per_row, choice, queries, key)


def trained_factory(storage: Storage, root: str) -> str | None:
    """Return the factory of the training that a data set's index has, if it has one."""
    training = read_training(storage, join(root, FOLDER))
    return training.factory if training is not None else None


def asked_k(settings: Settings) -> int:
    """Return the results a query that the index is tuned for."""
    return settings.index.recall_k or min(settings.search.k, MAX_TUNED_K)


def asked_rescore(settings: Settings) -> int | None:
    """Return the candidates that will be scored again for `asked_k` results; None where nobody says."""
    k, asked = asked_k(settings), settings.index.rescore
    if asked is not None:
        if 0 < asked < k:
            raise SettingsError(
                f"index.rescore {asked}: must be 0, or at least the {k} results of index.recall_k"
            )
        return asked
    searched = settings.search
    return None if searched.rescore is None else -(-searched.rescore * k // searched.k)


def settle_spec(
    dataset: DatasetSpec, n_vectors: int, settings: Settings, trained: str | None
) -> tuple[IndexSpec, int, Choice | None]:
    """Return the index that the settings mean for so many vectors, and the candidates to score again.

    Where the factory is auto, the third is what it was chosen from.

    Args:
        dataset: whose vectors; their length and norm decide what is possible.
        n_vectors: at least 1. Before the rows are embedded, their number: no more vectors can come of them.
        settings: the factory, or by what to choose it.
        trained: the factory of the training that is there, if one is; it needs no rows.

    Raises:
        SettingsError: no such index can be built from them.
    """
    made = [output.name for output in dataset.model.outputs]
    if EMBEDDING not in made:
        raise SettingsError(
            f"the data set has no output {EMBEDDING}, only {', '.join(made)}, and an index is made of that: "
            f"embed with {EMBEDDING} among model.outputs, into another output.uri"
        )
    if not dataset.model.normalize:
        raise SettingsError(
            "the vectors of the data set are not normalised, and an index needs model.normalize"
        )
    asked, rescore = settings.index, asked_rescore(settings)
    factory, choice = asked.factory, None
    if factory == "auto":
        wish = Wish(n_vectors, dataset.model.dim, asked.memory_bytes, asked.recall_target, asked_k(settings))
        try:
            choice = choose(wish, rescore)
        except IndexBuildError as error:
            raise SettingsError(str(error)) from error
        factory, rescore = choice.factory, choice.rescore
    try:
        spec = check_factory(factory, dataset.model.dim, Metric(asked.metric))
    except IndexBuildError as error:
        raise SettingsError(str(error)) from error
    if n_vectors < spec.min_training_rows and (trained != spec.factory or asked.retrain):
        fewer = _with_fewer_lists(spec, n_vectors)
        instead = "'auto' or 'Flat'" if fewer is None else f"'auto', 'Flat' or fewer lists, such as {fewer}"
        raise SettingsError(
            f"index.factory {factory!r} needs at least {spec.min_training_rows:,} vectors to train on, there "
            f"are {n_vectors:,}: use {instead}"
        )
    return spec, rescore or 0, choice


def _with_fewer_lists(spec: IndexSpec, n_vectors: int) -> str | None:
    """Return the factory with as many lists as the vectors can train; None where its code needs more, too."""
    fewer = re.sub(r"IVF\d+", f"IVF{choose_nlist(n_vectors)}", spec.factory)
    return fewer if check_factory(fewer, spec.dim, spec.metric).min_training_rows <= n_vectors else None
