"""Reports and what they vouch for, and what must hold at any moment, finished or not."""

from collections.abc import Iterable
from typing import Any

from tests.campaign.checks.findings import check_fact, names_below, read_json, read_table, sha256


def check_report(fs: Any, folder: str) -> list[str]:
    """Check that the report of a finished run is there, says so, and is right about its files."""
    path = f"{folder}/report.json"
    if not fs.exists(path):
        return [f"{path}: there is no report"]
    report = read_json(fs, path)
    broken = [] if report["complete"] else [f"{path}: is not that of a complete run: {report['outcome']}"]
    if not fs.exists(f"{folder}/report.html") or b"<html" not in fs.cat_file(f"{folder}/report.html"):
        broken.append(f"{folder}/report.html: there is no page")
    return broken + vouched(fs, folder, report)


def vouched(fs: Any, folder: str, report: dict[str, Any]) -> list[str]:
    """Return what a report that says ``complete`` vouches for and is not so."""
    if not report["complete"]:
        return []
    broken = []
    for fact in report["files"]:
        _, protocol, there = fact["path"].partition("://")
        broken += check_fact(fs, there if protocol else f"{folder}/{fact['path']}", fact)
    # A data set has a manifest for its files, an index its description: the report names which.
    if report["job"] == "embed" and report["key"] != _digest(fs, f"{folder}/manifest.json"):
        broken.append("it is of another manifest")
    if report["job"] == "index" and report["key"] != _inputs(fs, f"{folder}/index.json"):
        broken.append("it is of another index.json")
    return [f"{folder}/report.json says complete, but {what}" for what in broken]


def check_moment(fs: Any, folders: Iterable[str], foreign: frozenset[str]) -> tuple[list[str], int]:
    """Check what must hold at any moment: all that has a final name is whole, all that is vouched for is so.

    Returns:
        What is broken, and how many reports said that their run was complete.
    """
    broken: list[str] = []
    complete = 0
    for folder in folders:
        found = _half_written(fs, folder, names_below(fs, folder, foreign))
        broken += found
        if found:
            continue
        names = names_below(fs, folder, foreign)
        if "report.json" in names:
            report = read_json(fs, f"{folder}/report.json")
            complete += report["complete"]
            broken += vouched(fs, folder, report)
        broken += _indices(fs, folder, names)
        for name in (n for n in names if n.startswith("done/")):
            broken += _shards(fs, folder, {"shards": [read_json(fs, f"{folder}/{name}")]})
        if "manifest.json" in names:
            broken += _shards(fs, folder, read_json(fs, f"{folder}/manifest.json"))
    return list(dict.fromkeys(broken)), complete


def file_facts(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the facts of all files that a manifest names."""
    return [s[kind] for s in manifest["shards"] for kind in ("embeddings", "rejected") if s[kind]]


def digest_of(data: bytes) -> str:
    """Return how reports and changes refer to a manifest: the sha256 over its length and its bytes."""
    return sha256(len(data).to_bytes(8, "little") + data)


def _digest(fs: Any, path: str) -> str | None:
    return digest_of(fs.cat_file(path)) if fs.exists(path) else None


def _inputs(fs: Any, path: str) -> str | None:
    return read_json(fs, path)["inputs"] if fs.exists(path) else None


def _half_written(fs: Any, folder: str, names: set[str]) -> list[str]:
    broken = []
    for name in sorted(names):
        try:
            if name.endswith(".parquet"):
                read_table(fs, f"{folder}/{name}")
            elif name.endswith(".json"):
                read_json(fs, f"{folder}/{name}")
        except ValueError as error:
            broken.append(f"{folder}/{name}: half-written ({error})")
        except FileNotFoundError:
            pass  # its removal was under way when the job was killed
    return broken


def _shards(fs: Any, folder: str, manifest: dict[str, Any]) -> list[str]:
    return [
        line for fact in file_facts(manifest) for line in check_fact(fs, f"{folder}/{fact['path']}", fact)
    ]


def _indices(fs: Any, folder: str, names: set[str]) -> list[str]:
    if "index.json" not in names:
        return []
    files = read_json(fs, f"{folder}/index.json")["files"]
    return [
        f"index.json: {line}" for fact in files for line in check_fact(fs, f"{folder}/{fact['path']}", fact)
    ]
