"""What decides an index: the data set, the factory, the queries; checked before anything is built."""

from dataclasses import dataclass

from bge_ray.dataset.folder import Dataset
from bge_ray.errors import DatasetMismatchError, IndexBuildError, SettingsError
from bge_ray.index.factory import IndexSpec, Metric, check_factory, choose_factory, choose_nlist
from bge_ray.pipeline.index.queries import Queries, given_queries
from bge_ray.pipeline.index.steps import key_of
from bge_ray.records.dataset import DatasetSpec, Manifest
from bge_ray.records.index import INDEX_FORMAT_VERSION
from bge_ray.records.model import EMBEDDING
from bge_ray.settings.sections import IndexSettings


@dataclass(frozen=True)
class Inputs:
    """All that decides an index, checked; ``key`` is a name for it."""

    dataset: DatasetSpec
    manifest: Manifest
    spec: IndexSpec
    queries: Queries | None
    key: str


def read_inputs(dataset: Dataset, settings: IndexSettings) -> Inputs:
    """Read what the index of a data set is made from, and check that it can be made.

    Raises:
        SettingsError, CorpusError, DatasetMismatchError: it cannot.
    """
    there, manifest = dataset.read_spec(), dataset.read_manifest()
    name = f"output.uri {dataset.root}"
    if there is None or manifest is None:
        raise SettingsError(f"{name}: no complete data set there; run embed.py first")
    if manifest.vector_fingerprint != there.vector_fingerprint:
        raise DatasetMismatchError(
            f"{name}: its manifest is of another data set ({manifest.vector_fingerprint[:12]}) than its "
            f"dataset.json ({there.vector_fingerprint[:12]}); run embed.py again"
        )
    if not manifest.rows_out:
        raise SettingsError(f"{name}: the data set has no vectors")
    spec = settle_spec(there, manifest.rows_out, settings)
    queries = given_queries(dataset.storage, settings)
    key = key_of(
        INDEX_FORMAT_VERSION,
        manifest.vector_fingerprint,
        spec.factory,
        spec.metric.value,
        settings.layout,
        settings.range_bytes,
        settings.recall_target,
        settings.num_queries,
        queries.sha256 if queries else None,
        [m.embeddings.sha256 for m in manifest.shards if m.embeddings is not None],
    )
    return Inputs(there, manifest, spec, queries, key)


def settle_spec(dataset: DatasetSpec, n_vectors: int, settings: IndexSettings) -> IndexSpec:
    """Return the index that the settings mean for so many vectors.

    Args:
        dataset: whose vectors; their length and norm decide what is possible.
        n_vectors: at least 1. Before the rows are embedded, their number: no more vectors can come of them.
        settings: the factory, or by what to choose it.

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
    factory = settings.factory
    if factory == "auto":
        factory = choose_factory(n_vectors, dataset.model.dim, settings.memory_bytes)
    try:
        spec = check_factory(factory, dataset.model.dim, Metric(settings.metric))
    except IndexBuildError as error:
        raise SettingsError(str(error)) from error
    if n_vectors < spec.min_training_rows:
        raise SettingsError(
            f"index.factory {factory!r} needs at least {spec.min_training_rows:,} vectors to train on, there "
            f"are {n_vectors:,}: use 'auto', 'Flat' or fewer lists, such as IVF{choose_nlist(n_vectors)}"
        )
    return spec
