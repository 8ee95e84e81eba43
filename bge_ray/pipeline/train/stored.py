"""Checkpoints and the finished model in the work folder of an output: files in pieces, and a marker at last.

Each attempt has names of its own, so that a worker that is thought dead overwrites nothing of another's.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from bge_ray.errors import StorageError
from bge_ray.pipeline.runs.parts import PIECE_BYTES
from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.reports import TrainStep
from bge_ray.storage.concatenate import Piece
from bge_ray.storage.objects import Storage, join

logger = logging.getLogger(__name__)

Kind: TypeAlias = Literal["checkpoint", "model"]

OWN_WORK = re.compile(r"(checkpoint|model)-\d{8}-[0-9a-f]{8}(\.json|/.+\.\d{6})")
_MARKER = re.compile(r"(checkpoint|model)-\d{8}-[0-9a-f]{8}\.json")
# The newest two: the last one may have been half of a machine that was dying.
KEPT = 2


@dataclass(frozen=True)
class StoredFile:
    """A file of a stored folder, by its path there."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredFolder:
    """A marker: what was stored, of which training, after how many steps; ``curve`` as far as they went."""

    name: str
    key: str
    step: int
    files: tuple[StoredFile, ...]
    curve: tuple[TrainStep, ...]

    def pieces(self, work: str, file: StoredFile) -> list[Piece]:
        """Return the objects that a file is made of; an empty file has one, too."""
        sizes = [min(PIECE_BYTES, file.bytes - start) for start in range(0, file.bytes, PIECE_BYTES)] or [0]
        stem = join(work, self.name, file.path)
        return [Piece(f"{stem}.{number:06d}", size) for number, size in enumerate(sizes)]


def store(
    storage: Storage,
    work: str,
    local: Path,
    *,
    kind: Kind,
    key: str,
    step: int,
    attempt: str,
    curve: tuple[TrainStep, ...],
) -> StoredFolder:
    """Store a folder of this machine; it is there once its marker is.

    Args:
        storage: for all requests.
        work: URI of the work folder.
        local: the folder.
        kind: what it is.
        key: of the training.
        step: after how many steps.
        attempt: eight hex digits that no other attempt has.
        curve: of the steps so far.
    """
    name = f"{kind}-{step:08d}-{attempt}"
    paths = sorted(path for path in local.rglob("*") if path.is_file())
    files = tuple(
        _store_file(storage, join(work, name), local, path.relative_to(local).as_posix()) for path in paths
    )
    folder = StoredFolder(name, key, step, files, curve)
    storage.write(join(work, f"{name}.json"), to_json(folder))
    return folder


def _store_file(storage: Storage, place: str, local: Path, path: str) -> StoredFile:
    sha, size = hashlib.sha256(), 0
    with (local / path).open("rb") as file:
        number = 0
        while (data := file.read(PIECE_BYTES)) or not number:
            storage.write(join(place, f"{path}.{number:06d}"), data)
            sha.update(data)
            size += len(data)
            number += 1
    return StoredFile(path, size, sha.hexdigest())


def stored(storage: Storage, work: str, kind: Kind, key: str) -> list[StoredFolder]:
    """Return what is stored of a training, the newest first."""
    found = []
    for info in storage.list_files(work):
        name = info.uri.rpartition("/")[2]
        if not name.startswith(f"{kind}-") or _MARKER.fullmatch(name) is None:
            continue
        data = storage.read_optional(info.uri)
        try:
            folder = from_json(StoredFolder, data or b"")
        except ValueError:
            continue
        if folder.key == key and f"{folder.name}.json" == name:
            found.append(folder)
    return sorted(found, key=lambda folder: (folder.step, folder.name), reverse=True)


def restore(storage: Storage, work: str, folder: StoredFolder, target: Path) -> None:
    """Bring a stored folder to this machine.

    Raises:
        StorageError: an object is missing, or is not what was stored.
    """
    for file in folder.files:
        path = target / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        sha = hashlib.sha256()
        with path.open("wb") as to:
            for data in read_pieces(storage, folder.pieces(work, file)):
                sha.update(data)
                to.write(data)
        if sha.hexdigest() != file.sha256:
            raise StorageError(f"{join(work, folder.name, file.path)}: is not what was stored")


def read_pieces(storage: Storage, pieces: list[Piece]) -> Iterator[bytes]:
    """Yield the content of objects one after the other.

    Raises:
        StorageError: one is missing, or has another size.
    """
    for piece in pieces:
        data = storage.read_optional(piece.uri)
        if data is None or len(data) != piece.size:
            raise StorageError(f"{piece.uri}: is missing, or is not what was stored")
        yield data


def remove_older(storage: Storage, work: str, key: str) -> None:
    """Remove the checkpoints of a training but the newest; their markers go first."""
    for folder in stored(storage, work, "checkpoint", key)[KEPT:]:
        storage.delete([join(work, f"{folder.name}.json")])
        storage.delete([piece.uri for file in folder.files for piece in folder.pieces(work, file)])
