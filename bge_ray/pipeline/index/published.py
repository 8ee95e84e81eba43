"""The published index of a data set, as searches and the next build read it."""

from dataclasses import dataclass

from bge_ray.errors import DatasetMismatchError
from bge_ray.pipeline.index.tasks import WrittenFile
from bge_ray.records.canonical import from_json
from bge_ray.records.index import INDEX_FORMAT_VERSION, IndexDescription
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder

FOLDER = "index"


@dataclass(frozen=True)
class _Versioned:
    """The part of index.json that every version has."""

    format_version: int


def read_index(storage: Storage, root: str) -> IndexDescription | None:
    """Return the description of the published index, or None.

    Raises:
        DatasetMismatchError: index.json is of another version, damaged, changed, or not ours.
    """
    uri = join(root, FOLDER, "index.json")
    data = storage.read_optional(uri)
    if data is None:
        return None
    try:
        # The version comes first: a description of another version need not look like ours at all.
        version = from_json(_Versioned, data).format_version
        if version != INDEX_FORMAT_VERSION:
            raise DatasetMismatchError(
                f"{uri}: is of format {version}, this version reads {INDEX_FORMAT_VERSION}; run index.py to "
                "build the index anew"
            )
        description = from_json(IndexDescription, data)
    except ValueError as error:
        raise DatasetMismatchError(
            f"{uri}: not an index description of ours, or damaged ({error}); move it away and run "
            "index.py to build the index anew"
        ) from error
    # Its effort and what it claims to find stand under no other digest.
    if not OwnedFolder(storage, join(root, FOLDER), "index", "output.uri").vouches_for("index.json", data):
        raise DatasetMismatchError(
            f"{uri}: was changed since it was written; restore it, or move it away and run index.py to build "
            "the index anew"
        )
    return description


def index_files(root: str, index: IndexDescription) -> list[WrittenFile]:
    """Return the files of a published index, with full URIs."""
    return [WrittenFile(join(root, FOLDER, f.path), f.bytes, f.sha256, f.rows) for f in index.files]
