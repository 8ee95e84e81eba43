"""Folders as places: whether two URIs mean one, and which settings may name folders within each other.

It knows the names of this project's own files and folders, so that it can tell whose a path is without a
request; whether a file that has such a name is ours, `storage.ownership` knows.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem

from bge_ray.errors import OutputCollisionError
from bge_ray.storage.objects import fixed_prefix, is_glob, is_hidden

# Folders that a job makes below its output for itself; `reranked` is an output of its own.
OWN_FOLDERS = frozenset({"changes", "done", "embeddings", "index", "plan", "rejected", "work"})
# Files that a job writes right below its output.
OWN_FILES = frozenset(
    {
        "README.md",
        "audit.parquet",
        "bench.json",
        "bench.md",
        "dataset.json",
        "lease.json",
        "lists.parquet",
        "manifest.json",
        "metrics.json",
        "metrics.md",
        "metrics.svg",
        "per_query.parquet",
        "rejected.parquet",
        "report.html",
        "report.json",
        "run.parquet",
        "run.trec",
        "tuples.parquet",
        "wins.svg",
    }
)
# And what one job alone writes there, by the setting of its output; elsewhere these are names of inputs.
FURTHER_FILES = {
    "mine.output": frozenset({"negatives.jsonl"}),
    "train.output": frozenset({"config.json", "model.safetensors", "modules.json", "training.json"}),
}
# What the names in OWN_FOLDERS look like to a glob.
_SHARDS = ("000000-000000000.parquet", "index.json", "index.faiss")
_SAME_PROTOCOL = {"s3a": "s3", "s3n": "s3", "gs": "gcs", "local": "file", "abfss": "abfs", "az": "abfs"}


class Place(NamedTuple):
    """Where a URI leads: two that lead to one place are equal, and places have an order."""

    protocol: str
    parts: tuple[str, ...]


def place(uri: str) -> Place:
    """Return where a URI leads, without a request.

    A local path becomes absolute, its ``..`` and its symbolic links are followed, as far as it exists.
    In an object store a key is taken as it is: its case counts, and so does ``..``.
    """
    if re.search(r"::\w+://", uri):  # a cache in front of another store
        uri = uri.rpartition("::")[2]
    protocol, path = split_protocol(uri)
    protocol = _SAME_PROTOCOL.get(protocol or "file", protocol or "file")
    if protocol == "file":
        path = Path(LocalFileSystem._strip_protocol(path)).resolve().as_posix()
    return Place(protocol, tuple(path.strip("/").split("/")) if path.strip("/") else ())


def absolute(uri: str) -> str:
    """Return a URI, or a glob, that means the same from every working folder."""
    protocol, path = split_protocol(uri)
    return LocalFileSystem._strip_protocol(path) if protocol in (None, "file", "local") else uri


def same_place(a: str, b: str) -> bool:
    """Tell whether two URIs name one file or folder."""
    return place(a) == place(b)


def refuse_collisions(
    outputs: Mapping[str, str | None],
    listed: Mapping[str, str | None],
    picked: Mapping[str, str | None],
) -> None:
    """Refuse settings by which jobs would write over each other's files, or read what they wrote.

    Args:
        outputs: the folders to be written, by the setting that names them; those not set are None.
        listed: inputs that are a file, a folder with all below it, or a glob.
        picked: inputs that are a file, or a folder of which single files are taken. They may well be the
            output of another job, but not that of their own section.

    Raises:
        OutputCollisionError: names both settings.
    """
    folders = [(key, uri) for key, uri in outputs.items() if uri is not None]
    for number, (key, uri) in enumerate(folders):
        for other, other_uri in folders[:number]:
            _refuse_outputs((other, other_uri), (key, uri))
    for key, uri in folders:
        for name, source in listed.items():
            if source is not None:
                _refuse_input((name, source), (key, uri))
                _refuse_listing((name, source), (key, uri))
        for name, source in picked.items():
            if source is not None and _section(name) == _section(key):
                _refuse_input((name, source), (key, uri))
                _refuse_outputs((name, source), (key, uri))


def refuse_own_files(setting: str, uris: Iterable[str], outputs: Mapping[str, str | None]) -> None:
    """Refuse an input whose listing holds files that a job writes; a glob may reach them unforeseen.

    Args:
        setting: the one that names the input.
        uris: of the objects listed.
        outputs: as in `refuse_collisions`.

    Raises:
        OutputCollisionError: names both settings, and one of the files.
    """
    folders = [(key, place(uri)) for key, uri in outputs.items() if uri is not None]
    for uri in uris:
        where = place(uri)
        for key, folder in folders:
            if _is_own(_below(where, folder), key):
                raise OutputCollisionError(
                    f"{setting}: lists {uri}, which is the output of {key}; choose a {setting} without "
                    f"it, or another {key}"
                )


def _refuse_outputs(one: tuple[str, str], two: tuple[str, str]) -> None:
    if same_place(one[1], two[1]):
        raise OutputCollisionError(f"{one[0]} and {two[0]}: both are {two[1]}; choose another {two[0]}")
    for (key, uri), (outer_key, outer) in ((one, two), (two, one)):
        if _is_own(_below(place(uri), place(outer)), outer_key):
            raise OutputCollisionError(
                f"{key} {uri}: lies where {outer_key} {outer} has files of its own; choose another {key}"
            )


def _refuse_input(given: tuple[str, str], output: tuple[str, str]) -> None:
    (name, source), (key, uri) = given, output
    where, folder = place(source), place(uri)
    if where == folder:
        raise OutputCollisionError(
            f"{key} and {name}: both are {uri}; an output is no input, choose another {key}"
        )
    if _is_own(_below(where, folder), key):
        raise OutputCollisionError(
            f"{name} {source}: lies where {key} {uri} has files of its own, which would be replaced; choose "
            f"another {key}"
        )


def _refuse_listing(given: tuple[str, str], output: tuple[str, str]) -> None:
    (name, source), (key, uri) = given, output
    folder, names = place(uri), (*_own_files(key), *_SHARDS)
    if _lists(place(source), folder) or (is_glob(source) and _matches(source, folder, names)):
        raise OutputCollisionError(
            f"{key} {uri}: lies inside {name} {source}, which would list what is written there; choose "
            f"another {key}"
        )


def _section(setting: str) -> str:
    return setting.partition(".")[0]


def _below(inner: Place, outer: Place) -> tuple[str, ...]:
    """Return the parts of a place below another; none if it does not lie there."""
    n = len(outer.parts)
    within = inner.protocol == outer.protocol and inner.parts[:n] == outer.parts
    return inner.parts[n:] if within else ()


def _own_files(key: str) -> frozenset[str]:
    """Return the names of files right below an output that are a job's, by the setting of the output."""
    return OWN_FILES | FURTHER_FILES.get(key, frozenset())


def _is_own(below: tuple[str, ...], key: str) -> bool:
    """Tell whether a path below an output is one that a job writes there."""
    return bool(below) and (below[0] in OWN_FOLDERS or (len(below) == 1 and below[0] in _own_files(key)))


def _lists(where: Place, folder: Place) -> bool:
    """Tell whether a recursive listing of a place sees a folder below it."""
    below = _below(folder, where)
    return bool(below) and not is_hidden("/".join(below), "")


def _matches(pattern: str, folder: Place, names: Iterable[str]) -> bool:
    """Tell whether a glob with ``**`` sees files of some names in a folder; a listing settles the others."""
    fixed = fixed_prefix(pattern)
    below = _below(folder, place(fixed))
    inside = below or folder == place(fixed)
    rest = pattern.rstrip("/").removeprefix(fixed).strip("/").split("/")
    if not inside or "**" not in rest or is_hidden("/".join(below), ""):
        return False
    start = rest.index("**")
    head = rest[:start]
    if len(head) > len(below) or not all(map(fnmatch.fnmatchcase, below, head)):
        return False
    return any(fnmatch.fnmatchcase(name, rest[-1].replace("**", "*")) for name in names)
