"""The guarantees, checked on what lies in the store; reads with plain clients, not with our own code."""

import hashlib
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DATA = ("embeddings", "rejected")


@dataclass
class Findings:
    """What a check came to; ``broken`` has a line for each guarantee that does not hold."""

    broken: list[str] = field(default_factory=list)
    rows: int = 0
    lost: int = 0
    doubled: int = 0


def snapshot(fs: Any, root: str) -> dict[str, Any]:
    """Return what a finished data set is, index included: to compare others with.

    Raises:
        AssertionError: it is itself not sound.
    """
    reference = {
        "manifest": fs.cat_file(f"{root}/manifest.json").decode(),
        "rows": Counter(_rows(fs, root, json.loads(fs.cat_file(f"{root}/manifest.json")))),
        "index": _index_files(fs, root),
    }
    findings = check_finished(fs, root, reference)
    assert not findings.broken, findings.broken
    return reference


def check_finished(fs: Any, root: str, reference: dict[str, Any]) -> Findings:
    """Compare a finished data set with the `snapshot` of an undisturbed one."""
    found = Findings()
    names = _listing(fs, root)
    if "manifest.json" not in names:
        found.broken.append("there is no manifest")
        found.lost = sum(reference["rows"].values())
        return found
    text = fs.cat_file(f"{root}/manifest.json").decode()
    manifest = json.loads(text)
    if text != reference["manifest"]:
        found.broken.append("the manifest is not that of the clean run: " + _difference(manifest, reference))
    found.broken += _check_files(fs, root, manifest)
    rows = Counter(_rows(fs, root, manifest))
    found.rows = sum(rows.values())
    found.lost = sum((Counter(reference["rows"]) - rows).values())
    found.doubled = sum((rows - Counter(reference["rows"])).values())
    if found.lost or found.doubled:
        found.broken.append(f"{found.lost} rows lost, {found.doubled} doubled")
    if (
        manifest["rows_in"] != manifest["rows_out"] + manifest["rows_rejected"]
        or found.rows != manifest["rows_in"]
    ):
        found.broken.append("rows in, out and rejected do not add up")
    live = {f["path"] for f in _facts(manifest)}
    left = {n for n in names if n.startswith(DATA)} - live | {n for n in names if n.startswith("done/")}
    if left:
        found.broken.append(f"left over: {sorted(left)}")
    found.broken += [f"lease not given back: {n}" for n in names if n.endswith("lease.json")]
    if not json.loads(fs.cat_file(f"{root}/report.json"))["outcome"].startswith("complete"):
        found.broken.append("the report is not that of a complete run")
    return found


def check_index(fs: Any, root: str, reference: dict[str, Any]) -> list[str]:
    """Compare the published index with that of the clean run: same names, same bytes, nothing else there."""
    try:
        files = _index_files(fs, root)
    except FileNotFoundError as error:
        return [f"the index is incomplete: {error}"]
    broken = []
    if files is None:
        return ["there is no index"]
    if files != reference["index"]:
        differ = sorted(set(files.items()) ^ set(reference["index"].items()))
        broken.append(f"the index differs from the clean run's: {differ}")
    described = json.loads(fs.cat_file(f"{root}/index/index.json"))
    broken += [
        f"index/{fact['path']}: not what index.json says"
        for fact in described["files"]
        if files.get(fact["path"]) != fact["sha256"]
    ]
    return broken


def check_half_way(fs: Any, root: str) -> list[str]:
    """What must hold at any moment, finished or not: all that has a final name is whole."""
    broken = []
    names = _listing(fs, root)
    for name in names:
        data = fs.cat_file(f"{root}/{name}")
        try:
            if name.startswith(DATA):
                pq.read_table(pa.BufferReader(data))
            elif name.endswith(".json"):
                json.loads(data)
        except (ValueError, pa.ArrowException) as error:
            broken.append(f"{name}: half-written ({error})")
            continue
        if name.startswith("done/"):
            broken += _check_files(fs, root, {"shards": [json.loads(data)]})
    if "manifest.json" in names:
        broken += _check_files(fs, root, json.loads(fs.cat_file(f"{root}/manifest.json")))
    return broken


def _difference(manifest: dict[str, Any], reference: dict[str, Any]) -> str:
    """Name the first shard of which something else is said, and what, or the facts about the whole."""
    clean = json.loads(reference["manifest"])
    for ours, theirs in zip(manifest["shards"], clean["shards"], strict=False):
        if ours != theirs:
            return "; ".join(f"{k} {ours[k]}, not {theirs[k]}" for k in ours if ours[k] != theirs[k])
    return "; ".join(
        f"{k} {manifest[k]}, not {clean[k]}" for k in clean if k != "shards" and manifest[k] != clean[k]
    )


def _listing(fs: Any, root: str) -> set[str]:
    """Return the names below the root, the index apart."""
    names = {path.partition(f"{root}/")[2] for path in fs.find(root)}
    return {n for n in names if not n.startswith("index/")}


def _index_files(fs: Any, root: str) -> dict[str, str] | None:
    """Return the sha256 of each file of the index by name; empty for those that tell the time."""
    names = {path.partition(f"{root}/index/")[2] for path in fs.find(f"{root}/index")}
    if "index.json" not in names:
        return None
    told = {"index.json", "report.html", "report.json"}
    return {
        n: "" if n in told else hashlib.sha256(fs.cat_file(f"{root}/index/{n}")).hexdigest() for n in names
    }


def _facts(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [s[kind] for s in manifest["shards"] for kind in DATA if s[kind]]


def _check_files(fs: Any, root: str, manifest: dict[str, Any]) -> list[str]:
    broken = []
    for fact in _facts(manifest):
        try:
            data = fs.cat_file(f"{root}/{fact['path']}")
        except FileNotFoundError:
            broken.append(f"{fact['path']}: missing")
            continue
        if (len(data), hashlib.sha256(data).hexdigest()) != (fact["bytes"], fact["sha256"]):
            broken.append(f"{fact['path']}: other bytes than were vouched for")
        elif len(pq.read_table(io.BytesIO(data), columns=["vector_id"])) != fact["rows"]:
            broken.append(f"{fact['path']}: other rows than were vouched for")
    return broken


def _rows(fs: Any, root: str, manifest: dict[str, Any]) -> list[str]:
    """Return place and id of each row, in shards and among the rejected, as far as they can be read."""
    rows = []
    for fact in _facts(manifest):
        try:
            table = pq.read_table(io.BytesIO(fs.cat_file(f"{root}/{fact['path']}")))
        except (FileNotFoundError, pa.ArrowException):
            continue
        columns = (table["vector_id"].to_pylist(), table["passage_id"].to_pylist())
        rows += [f"{place} {name}" for place, name in zip(*columns, strict=True)]
    return rows
