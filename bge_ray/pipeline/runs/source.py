"""A complete data set, as search and rerank read it."""

from dataclasses import dataclass

from bge_ray.dataset.folder import Dataset
from bge_ray.errors import DatasetMismatchError, SettingsError
from bge_ray.records.dataset import DatasetSpec, Manifest
from bge_ray.settings.sections import Settings
from bge_ray.storage.objects import Storage


@dataclass(frozen=True)
class Source:
    """What it is and what is in it."""

    storage: Storage
    root: str
    spec: DatasetSpec
    manifest: Manifest

    @property
    def shard_hashes(self) -> list[str]:
        """The sha256 of each embedding shard: what decides an answer."""
        return [m.embeddings.sha256 for m in self.manifest.shards if m.embeddings is not None]


def open_source(settings: Settings) -> Source:
    """Open the data set at output.uri.

    Raises:
        SettingsError: there is no complete data set.
        DatasetMismatchError: its files do not belong together.
    """
    settings.require("output.uri")
    storage = Storage(settings.output.storage_timeout_s)
    dataset = Dataset(storage, str(settings.output.uri))
    spec, manifest = dataset.read_spec(), dataset.read_manifest()
    if spec is None or manifest is None:
        raise SettingsError(f"output.uri {dataset.root}: no complete data set there; run embed.py first")
    if manifest.vector_fingerprint != spec.vector_fingerprint:
        raise DatasetMismatchError(
            f"output.uri {dataset.root}: its manifest is of another data set than its dataset.json; "
            "run embed.py again"
        )
    if not manifest.vectors:
        raise SettingsError(f"output.uri {dataset.root}: the data set has no vectors")
    return Source(storage, dataset.root, spec, manifest)
