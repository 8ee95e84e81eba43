"""A complete data set, as search and rerank read it."""

from collections.abc import Mapping
from dataclasses import dataclass

from bge_ray.dataset.folder import Dataset, read_complete
from bge_ray.dataset.pointer import follow
from bge_ray.errors import SettingsError
from bge_ray.records.dataset import DatasetSpec, Manifest
from bge_ray.settings.sections import Settings
from bge_ray.storage.folders import refuse_collisions
from bge_ray.storage.objects import Storage


@dataclass(frozen=True)
class Source:
    """What it is and what is in it."""

    storage: Storage
    root: str
    spec: DatasetSpec
    manifest: Manifest

    @property
    def chunked(self) -> bool:
        """Whether its texts were cut into chunks."""
        return self.spec.chunking is not None

    @property
    def shard_hashes(self) -> list[str]:
        """The sha256 of each embedding shard: what decides an answer."""
        return [m.embeddings.sha256 for m in self.manifest.shards if m.embeddings is not None]


def refuse_in_source(source: Source, outputs: Mapping[str, str | None]) -> None:
    """Refuse to write into the corpus or the model of a data set, also where no setting names it.

    Args:
        source: the data set, whose newest plan says where its corpus is.
        outputs: as in `refuse_collisions`.

    Raises:
        OutputCollisionError: names the setting, and the corpus or the model.
    """
    inputs = {
        f"the corpus of output.uri {source.root}": Dataset(source.storage, source.root).corpus(),
        f"the model of output.uri {source.root}": source.spec.model.name,
    }
    refuse_collisions(outputs, inputs, {})


def open_source(settings: Settings) -> Source:
    """Open the data set at output.uri, or the one that a pointer there leads to.

    Raises:
        SettingsError: there is no complete data set.
        DatasetMismatchError: its files do not belong together.
    """
    settings.require("output.uri")
    storage = Storage(settings.output.storage_timeout_s)
    root = follow(storage, str(settings.output.uri))
    spec, manifest = read_complete(storage, root)
    if not manifest.vectors:
        raise SettingsError(f"output.uri {root}: the data set has no vectors")
    return Source(storage, root, spec, manifest)
