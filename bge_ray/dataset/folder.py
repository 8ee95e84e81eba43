"""The output folder as a data set: its spec, plans, markers, manifest, and what may be swept."""

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.dataset.card import make_card
from bge_ray.dataset.changes import write_change
from bge_ray.dataset.commit import FINGERPRINT_KEY
from bge_ray.errors import DatasetMismatchError, OutputCollisionError, SettingsError
from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.dataset import DatasetSpec, FileFact, Manifest, Marker
from bge_ray.records.ids import FORMAT_VERSION
from bge_ray.records.plan import Plan
from bge_ray.storage.folders import same_place
from bge_ray.storage.objects import ObjectInfo, Storage, join
from bge_ray.storage.ownership import OwnedFolder
from bge_ray.storage.sweep import Swept, remove_empty_folders, retire

logger = logging.getLogger(__name__)

OWNER = "dataset"
CARD, SPEC = "README.md", "dataset.json"
KEPT_PLANS = 10
PARALLEL_REQUESTS = 16

R = TypeVar("R")

_RESTORE_PLAN = "restore it; without it objects would get new numbers"
_PLAN_NAME = re.compile(r"plan/(\d+)\.json")
_SHARD_NAME = re.compile(r"(embeddings|rejected)/\d{8}-\d{10}(-[0-9a-f]{12})?\.parquet")
_MARKER_NAME = re.compile(r"done/\d{8}-\d{10}\.json")


@dataclass(frozen=True)
class _Plan:
    """The part of a plan that says where its corpus is."""

    corpus: str = ""


@dataclass(frozen=True)
class Dataset:
    """Reads and writes the small files below ``root``; `dataset.commit` writes the large ones."""

    storage: Storage
    root: str

    @property
    def folder(self) -> OwnedFolder:
        """The folder as this project's."""
        return OwnedFolder(self.storage, self.root, OWNER, "output.uri", ("manifest.json",))

    def read_spec(self) -> DatasetSpec | None:
        """Return what the data set is, or None where there is none yet.

        Raises:
            DatasetMismatchError: dataset.json was written by an incompatible version, or changed since.
        """
        uri = join(self.root, SPEC)
        data = self.storage.read_optional(uri)
        if data is None:
            return None
        # The version comes first: a format of another version need not look like ours at all.
        version = _format_version(data)
        if version not in (None, FORMAT_VERSION):
            raise DatasetMismatchError(
                f"{uri}: format {version}, this version writes {FORMAT_VERSION}; choose another output.uri"
            )
        try:
            spec = from_json(DatasetSpec, data)
        except ValueError as error:
            raise DatasetMismatchError(f"{uri}: not a data set of ours: {error}") from error
        # No fingerprint covers what changes no vector, such as the instruction put before queries.
        if not self.folder.vouches_for(SPEC, data):
            raise DatasetMismatchError(
                f"{uri}: was changed since it was written; restore it; what may differ from it has a "
                "setting, such as model.query_instruction"
            )
        return spec

    def create_spec(self, spec: DatasetSpec) -> None:
        """Write dataset.json, or make sure that the one there says the same.

        Raises:
            DatasetMismatchError: another data set is there.
        """
        data = to_json(spec)
        while (there := self.read_spec()) is None:
            self.folder.announce(SPEC, len(data), hashlib.sha256(data).hexdigest())
            if self.storage.create(join(self.root, SPEC), data):
                return
        spec.check_same(there, self.root)

    def change_rows(self, spec: DatasetSpec) -> None:
        """Let dataset.json say which columns the shards have that are about to be published.

        Raises:
            DatasetMismatchError: another data set is there, or none.
            OutputCollisionError: a foreign file has the name.
        """
        there = self.read_spec()
        if there is None:
            raise DatasetMismatchError(f"{join(self.root, SPEC)}: is gone; restore it")
        spec.check_same(there, self.root)
        if there.rows_fingerprint != spec.rows_fingerprint:
            self.folder.put(SPEC, to_json(there.with_rows_of(spec)))

    def latest_plan(self) -> tuple[int, Plan | None]:
        """Return the number of the newest plan and the plan; (0, None) where there is none.

        Raises:
            DatasetMismatchError: what has its name is none.
        """
        numbers = self._plan_numbers()
        if not numbers:
            return 0, None
        uri = self._plan_uri(numbers[-1])
        return numbers[-1], _parse(Plan, self.storage.read(uri), uri, _RESTORE_PLAN)

    def corpus(self) -> str | None:
        """Return where the newest plan found the corpus; None if no plan says so."""
        numbers = self._plan_numbers()
        if not numbers:
            return None
        uri = self._plan_uri(numbers[-1])
        # Not the objects: of those there may be millions.
        return _parse(_Plan, self.storage.read(uri), uri, _RESTORE_PLAN).corpus or None

    def check_numbers(self) -> None:
        """Make sure that there is a plan where one must have been: it knows which numbers are given.

        Raises:
            DatasetMismatchError: there is none.
        """
        # A plan comes before all of these, so it is looked for after them: another run may begin meanwhile.
        known = [name for name in (SPEC, "manifest.json") if self.storage.info(join(self.root, name))]
        found = [*known, *self._marker_paths()]
        if found and not self._plan_numbers():
            raise DatasetMismatchError(
                f"{join(self.root, 'plan')}: is gone, but {found[0]} is there; restore it, or choose another "
                "output.uri: without it objects would get numbers that are given"
            )

    def create_plan(self, number: int, plan: Plan) -> bool:
        """Write a plan under a number that was free; False if another run took it."""
        return self.storage.create(self._plan_uri(number), to_json(plan))

    def read_manifest(self) -> Manifest | None:
        """Return the manifest of the last complete run, or None.

        Raises:
            DatasetMismatchError: what has its name is none.
        """
        uri = join(self.root, "manifest.json")
        data = self.storage.read_optional(uri)
        if data is None:
            return None
        return _parse(Manifest, data, uri, "restore it, or remove it to embed the whole corpus again")

    def finished(self) -> dict[str, Marker]:
        """Return the markers whose files are there in full, by unit name; changes nothing.

        They come from ``done/`` and from the manifest. A marker whose file is missing or has
        another size (removed by hand, an over-eager lifecycle rule) does not count.

        Raises:
            DatasetMismatchError: what has the name of a marker is none.
        """
        manifest = self.read_manifest()
        folded = list(manifest.shards) if manifest else []
        there = self._shards()
        finished: dict[str, Marker] = {}
        damaged: dict[str, str] = {}
        for marker in [*self._read_markers(self._marker_paths()), *folded]:
            if marker.unit.name in finished:
                continue
            bad = [
                f.path for f in marker_files(marker) if f.path not in there or there[f.path].size != f.bytes
            ]
            if bad:
                damaged[marker.unit.name] = bad[0]
            else:
                finished[marker.unit.name] = marker
        for name, path in damaged.items():
            if name not in finished:
                text = "%s: missing or damaged; the unit is done again"
                logger.warning(text, join(self.root, path), extra={"unit": name})
        return finished

    def missing_files(self, manifest: Manifest) -> list[str]:
        """Return the paths of files that a manifest vouches for and that are not there in full."""
        there = self._shards()
        files = [fact for marker in manifest.shards for fact in marker_files(marker)]
        return [f.path for f in files if f.path not in there or there[f.path].size != f.bytes]

    def publish(self, manifest: Manifest) -> None:
        """Make a manifest the current one; only after this may anything be swept.

        Raises:
            OutputCollisionError: a foreign file has its name.
        """
        write_change(self.storage, self.root, self.read_manifest(), manifest)
        self.folder.put("manifest.json", to_json(manifest))

    def sweep(self, spec: DatasetSpec, manifest: Manifest, grace_s: float) -> Swept:
        """Remove what the published manifest does not need, and renew the card.

        That is folded markers, all but the last plans, temporary files of killed writers, and shards that
        have been dead for ``grace_s`` seconds.
        """
        live = {fact.path for marker in manifest.shards for fact in marker_files(marker)}
        others = {path: info for path, info in self._listed().items() if path not in live}
        dead = {p for p, info in others.items() if _SHARD_NAME.fullmatch(p) and self._is_ours(info)}
        swept = retire(self.storage, self.root, dead, grace_s, time.time())
        plans = [self._plan_uri(number) for number in self._plan_numbers()[:-KEPT_PLANS]]
        doomed = [*plans, *(join(self.root, path) for path in self._marker_paths())]
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            list(pool.map(lambda uri: self.storage.delete([uri]), doomed))
        self.storage.remove_temporaries(self.root)
        for folder in ("done", "rejected", "embeddings"):
            remove_empty_folders(self.storage, join(self.root, folder))
        shards = [m.embeddings.path for m in manifest.shards if m.embeddings is not None]
        # A reader of all Parquet files beside the shards would meet these.
        strays = [path for path in others.keys() - dead if re.fullmatch(r"embeddings/.+\.parquet", path)]
        card = make_card(self.root, spec, manifest, only_live=shards if swept.waiting or strays else ())
        try:
            self.folder.put(CARD, card)
        except OutputCollisionError as error:
            logger.warning("no card of the data set: %s", error)
        return swept

    def has_card(self) -> bool:
        """Tell whether there is a card, be it one that a person wrote or changed; that is said, and stays."""
        try:
            return self.folder.check_replaceable(CARD) is not None
        except OutputCollisionError as error:
            logger.warning("the card of the data set is not renewed: %s", error)
            return True

    def _is_ours(self, info: ObjectInfo) -> bool:
        """Tell whether a file with a name of ours is a shard that we wrote."""
        try:
            file = pa.PythonFile(self.storage.open(info.uri, info.size), mode="r")
            metadata = pq.read_schema(file).metadata
        except (OSError, pa.ArrowException):
            metadata = None
        if FINGERPRINT_KEY in (metadata or {}):
            return True
        logger.warning("%s: is no shard that this project wrote, or is damaged; it is left alone", info.uri)
        return False

    def _shards(self) -> dict[str, ObjectInfo]:
        """Return the files with names of shards, by path below the root."""
        return {path: info for path, info in self._listed().items() if _SHARD_NAME.fullmatch(path)}

    def _listed(self) -> dict[str, ObjectInfo]:
        """Return all files beside the shards, whosever they are, by path below the root."""
        return {**self._listing("embeddings"), **self._listing("rejected")}

    def _marker_paths(self) -> list[str]:
        return [path for path in self._listing("done") if _MARKER_NAME.fullmatch(path)]

    def _plan_uri(self, number: int) -> str:
        return join(self.root, "plan", f"{number:06d}.json")

    def _plan_numbers(self) -> list[int]:
        found = (_PLAN_NAME.fullmatch(path) for path in self._listing("plan"))
        return sorted(int(match.group(1)) for match in found if match is not None)

    def _listing(self, folder: str) -> dict[str, ObjectInfo]:
        """Return the files right in one folder of the data set, none below, by path below the root."""
        uri = join(self.root, folder)
        found = self.storage.list_files(uri)
        parents = {info.uri.rpartition("/")[0] for info in found}
        right_there = {parent for parent in parents if same_place(parent, uri)}
        return {
            f"{folder}/{PurePosixPath(info.uri).name}": info
            for info in found
            if info.uri.rpartition("/")[0] in right_there
        }

    def _read_markers(self, paths: Iterable[str]) -> list[Marker]:
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return [m for m in pool.map(self._read_marker, paths) if m is not None]

    def _read_marker(self, path: str) -> Marker | None:
        uri = join(self.root, path)
        data = self.storage.read_optional(uri)
        return None if data is None else _parse(Marker, data, uri, "move it away to do its unit again")


def read_complete(storage: Storage, root: str) -> tuple[DatasetSpec, Manifest]:
    """Return what the data set at ``root`` is, and what is in it.

    Raises:
        SettingsError: there is no complete data set.
        DatasetMismatchError: its files do not belong together, or are of another version.
    """
    dataset = Dataset(storage, root)
    spec, manifest = dataset.read_spec(), dataset.read_manifest()
    if spec is None or manifest is None:
        raise SettingsError(f"output.uri {root}: no complete data set there; run bge-ray embed first")
    if manifest.vector_fingerprint != spec.vector_fingerprint:
        raise DatasetMismatchError(
            f"output.uri {root}: its manifest is of another data set than its dataset.json; "
            "run bge-ray embed again"
        )
    return spec, manifest


def manifest_fact(manifest: Manifest) -> FileFact:
    """Return the fact of the file that a manifest is published as."""
    data = to_json(manifest)
    return FileFact("manifest.json", len(data), hashlib.sha256(data).hexdigest(), manifest.vectors)


def marker_files(marker: Marker) -> list[FileFact]:
    """Return the files that a marker vouches for."""
    return [fact for fact in (marker.embeddings, marker.rejected) if fact is not None]


def _parse(kind: type[R], data: bytes, uri: str, advice: str) -> R:
    try:
        return from_json(kind, data)
    except ValueError as error:
        name = kind.__name__.strip("_").lower()
        raise DatasetMismatchError(f"{uri}: not a {name} of ours, or damaged ({error}); {advice}") from error


def _format_version(data: bytes) -> object:
    try:
        spec = json.loads(data)
    except ValueError:
        return None
    return spec.get("format_version") if isinstance(spec, dict) else None
