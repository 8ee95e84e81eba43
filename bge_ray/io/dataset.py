"""The output folder as a data set: its spec, plans, markers, manifest, and what may be swept."""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

from bge_ray.errors import DatasetMismatchError, StorageError
from bge_ray.io.storage import ObjectInfo, Storage, join
from bge_ray.manifest import DatasetSpec, FileFact, Manifest, Marker, Plan, from_json, to_json
from bge_ray.schema import FORMAT_VERSION

logger = logging.getLogger(__name__)

KEPT_PLANS = 10
PARALLEL_REQUESTS = 16


@dataclass(frozen=True)
class Dataset:
    """Reads and writes the small files below ``root``; `io.shards` writes the large ones."""

    storage: Storage
    root: str

    def read_spec(self) -> DatasetSpec | None:
        """Return what the data set is, or None where there is none yet.

        Raises:
            DatasetMismatchError: dataset.json was written by an incompatible version.
        """
        uri = join(self.root, "dataset.json")
        data = self.storage.read_optional(uri)
        if data is None:
            return None
        try:
            spec = from_json(DatasetSpec, data)
        except ValueError as error:
            raise DatasetMismatchError(f"{uri}: not a data set of ours: {error}") from error
        if spec.format_version != FORMAT_VERSION:
            raise DatasetMismatchError(
                f"{uri}: format {spec.format_version}, this version writes {FORMAT_VERSION}; choose another output.uri"
            )
        return spec

    def create_spec(self, spec: DatasetSpec) -> None:
        """Write dataset.json, or make sure that the one there says the same.

        Raises:
            DatasetMismatchError: another data set is there.
        """
        if not self.storage.create(join(self.root, "dataset.json"), to_json(spec)):
            there = self.read_spec()
            if there is not None:
                spec.check_same(there, self.root)

    def latest_plan(self) -> tuple[int, Plan | None]:
        """Return the number of the newest plan and the plan; (0, None) where there is none."""
        names = self._listing("plan")
        if not names:
            return 0, None
        number = max(int(PurePosixPath(name).stem) for name in names)
        return number, from_json(Plan, self.storage.read(self._plan_uri(number)))

    def create_plan(self, number: int, plan: Plan) -> bool:
        """Write a plan under a number that was free; False if another run took it."""
        return self.storage.create(self._plan_uri(number), to_json(plan))

    def read_manifest(self) -> Manifest | None:
        """Return the manifest of the last complete run, or None."""
        data = self.storage.read_optional(join(self.root, "manifest.json"))
        return None if data is None else from_json(Manifest, data)

    def finished(self) -> dict[str, Marker]:
        """Return the markers whose files are there in full, by unit name.

        They come from the manifest and from ``done/``. A marker whose file is missing or has
        another size (removed by hand, an over-eager lifecycle rule) does not count; such a file
        is removed, because its name is needed for the right content.
        """
        manifest = self.read_manifest()
        markers = {marker.unit.name: marker for marker in (manifest.shards if manifest else ())}
        markers |= {marker.unit.name: marker for marker in self._read_markers(self._listing("done"))}
        there = {**self._listing("embeddings"), **self._listing("rejected")}
        finished = {}
        for name, marker in markers.items():
            bad = [
                fact
                for fact in marker_files(marker)
                if fact.path not in there or there[fact.path].size != fact.bytes
            ]
            if not bad:
                finished[name] = marker
                continue
            logger.warning("%s: %s is missing or damaged; the unit is done again", self.root, bad[0].path)
            self.storage.delete([join(self.root, fact.path) for fact in bad if fact.path in there])
        return finished

    def publish(self, manifest: Manifest) -> None:
        """Make a manifest the current one; only after this may anything be swept."""
        self.storage.write(join(self.root, "manifest.json"), to_json(manifest))

    def sweep(self, manifest: Manifest) -> int:
        """Remove what the published manifest does not need: folded markers, dead shards, old plans.

        Returns:
            How many shard files were removed.
        """
        live = {fact.path for marker in manifest.shards for fact in marker_files(marker)}
        dead = [
            path
            for folder in ("embeddings", "rejected")
            for path in self._listing(folder)
            if path not in live
        ]
        plans = sorted(self._listing("plan"))
        doomed = [*self._listing("done"), *dead, *plans[:-KEPT_PLANS]]
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            list(pool.map(lambda path: self.storage.delete([join(self.root, path)]), doomed))
        return len(dead)

    def _plan_uri(self, number: int) -> str:
        return join(self.root, "plan", f"{number:06d}.json")

    def _listing(self, folder: str) -> dict[str, ObjectInfo]:
        """Return the files of one folder of the data set by path below the root."""
        found = self.storage.list_files(join(self.root, folder))
        return {f"{folder}/{PurePosixPath(info.uri).name}": info for info in found}

    def _read_markers(self, paths: Iterable[str]) -> list[Marker]:
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return [m for m in pool.map(self._read_marker, paths) if m is not None]

    def _read_marker(self, path: str) -> Marker | None:
        data = self.storage.read_optional(join(self.root, path))
        if data is None:
            return None
        try:
            return from_json(Marker, data)
        except ValueError as error:
            raise StorageError(
                f"{join(self.root, path)}: not a marker ({error}); remove it and run again"
            ) from error


def marker_files(marker: Marker) -> list[FileFact]:
    """Return the files that a marker vouches for."""
    return [fact for fact in (marker.embeddings, marker.rejected) if fact is not None]
