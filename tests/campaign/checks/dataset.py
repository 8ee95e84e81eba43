"""The guarantees of a data set and its index, checked on what lies in the store."""

import base64
import json
import re
from collections import Counter
from typing import Any

import numpy as np

from tests.campaign.checks.findings import Findings, check_fact, names_below, read_json, read_table, sha256
from tests.campaign.checks.reports import check_report, digest_of, file_facts

DATA = ("embeddings/", "rejected/")
JOURNAL, RETIRED = "_bge_ray.json", "_retired.json"
ROW_BITS = 13
# Of float32 components: texts that are encoded in other company.
TOLERANCE = 1e-5


def snapshot(fs: Any, root: str, *, reuses: bool) -> dict[str, Any]:
    """Return what a finished data set is, index included: to compare others with.

    Where it reuses vectors, those of others are compared by value, and not by the bytes of their files: how
    many were there to be reused, and so who shared a batch with whom, goes by how far earlier runs came.

    Raises:
        AssertionError: it is itself not sound.
    """
    manifest = read_json(fs, f"{root}/manifest.json")
    reference = {
        "manifest": fs.cat_file(f"{root}/manifest.json").decode(),
        "rows": Counter(_rows(fs, root, manifest)),
        "index": _index_files(fs, root, frozenset()),
        "vectors": _encoded(*_vectors(fs, root, manifest)) if reuses else None,
    }
    broken = check_dataset(fs, root, reference).broken + check_index(fs, root, reference)
    assert not broken, broken
    return reference


def check_dataset(
    fs: Any,
    root: str,
    reference: dict[str, Any],
    foreign: frozenset[str] = frozenset(),
    died_after: float | None = None,
) -> Findings:
    """Compare a finished data set with the `snapshot` of an undisturbed one.

    Args:
        fs: client of the store.
        root: folder of the data set.
        reference: its snapshot.
        foreign: paths of files that are not ours; what has the name of a shard of ours keeps it.
        died_after: in seconds of the clock; dead files may lie there that died later, without it none may.
    """
    found = Findings()
    names = _own_names(fs, root, foreign)
    if "manifest.json" not in names:
        found.broken.append("there is no manifest")
        found.lost = sum(reference["rows"].values())
        return found
    text = fs.cat_file(f"{root}/manifest.json").decode()
    manifest, expected = json.loads(text), _renamed(reference["manifest"], root, foreign)
    ours, theirs = manifest, json.loads(expected)
    same = text == expected
    if reference["vectors"] is not None:
        ours, theirs = _without_bytes(ours), _without_bytes(theirs)
        same = ours == theirs
        found.broken += _check_vectors(fs, root, manifest, reference["vectors"])
    if not same:
        what = _difference(ours, theirs)
        found.broken.append(f"the manifest is not that of the clean run: {what}")
    for fact in file_facts(manifest):
        found.broken += check_fact(fs, f"{root}/{fact['path']}", fact)
    rows, clean = Counter(_rows(fs, root, manifest)), Counter(reference["rows"])
    found.rows = len({int(row.partition(" ")[0]) >> ROW_BITS for row in rows})
    found.lost, found.doubled = sum((clean - rows).values()), sum((rows - clean).values())
    if found.lost or found.doubled:
        found.broken.append(f"{found.lost} rows lost, {found.doubled} doubled")
    if (
        manifest["rows_in"] != manifest["rows_out"] + manifest["rows_rejected"]
        or found.rows != manifest["rows_in"]
    ):
        found.broken.append("rows in, out and rejected do not add up")
    found.broken += _check_left_over(fs, root, names, manifest, died_after)
    found.broken += _check_changes(fs, root, names, manifest)
    found.broken += check_report(fs, root)
    return found


def check_index(
    fs: Any, root: str, reference: dict[str, Any], foreign: frozenset[str] = frozenset()
) -> list[str]:
    """Compare the published index with that of the clean run: same names, same bytes, nothing else there."""
    files = _index_files(fs, root, foreign)
    if files is None:
        return ["there is no index"]
    broken = check_report(fs, f"{root}/index")
    if reference["vectors"] is not None:
        if files.keys() != reference["index"].keys():
            broken.append(f"the index has other files than the clean run's: {sorted(files)}")
    elif files != reference["index"]:
        differ = sorted(set(files.items()) ^ set(reference["index"].items()))
        broken.append(f"the index differs from the clean run's: {differ}")
    for fact in read_json(fs, f"{root}/index/index.json")["files"]:
        broken += check_fact(fs, f"{root}/index/{fact['path']}", fact)
    return broken


def _own_names(fs: Any, root: str, foreign: frozenset[str]) -> set[str]:
    """Return our names below the root, the index apart."""
    return {n for n in names_below(fs, root, foreign) if not n.startswith("index/")}


def _renamed(manifest: str, root: str, foreign: frozenset[str]) -> str:
    """Return the manifest that a run must come to where foreign files have names of its shards.

    Such a shard has the beginning of its sha256 in its name.
    """
    for fact in file_facts(json.loads(manifest)):
        if f"{root}/{fact['path']}" in foreign:
            other = fact["path"].replace(".parquet", f"-{fact['sha256'][:12]}.parquet")
            manifest = manifest.replace(f'"{fact["path"]}"', f'"{other}"')
    return manifest


def _without_bytes(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest without what follows from the bytes of shards."""

    def stripped(value: Any) -> Any:
        if isinstance(value, list):
            return [stripped(item) for item in value]
        if not isinstance(value, dict):
            return value
        kept = {key: stripped(item) for key, item in value.items() if key not in ("bytes", "sha256")}
        if "path" in kept:
            kept["path"] = re.sub(r"-[0-9a-f]{12}(?=\.parquet$)", "", kept["path"])
        return kept

    found: dict[str, Any] = stripped(manifest)
    return found


def _vectors(fs: Any, root: str, manifest: dict[str, Any]) -> tuple[Any, Any]:
    """Return the (n,) ids of all vectors, ascending, and the (n, dim) vectors."""
    ids, vectors = [np.empty(0, np.int64)], []
    for shard in manifest["shards"]:
        if shard["embeddings"]:
            table = read_table(fs, f"{root}/{shard['embeddings']['path']}")
            ids.append(table["vector_id"].to_numpy())
            vectors.append(np.stack(table["embedding"].to_pylist()).astype(np.float32))
    together, order = np.concatenate(ids), np.argsort(np.concatenate(ids))
    return together[order], np.concatenate(vectors)[order]


def _encoded(ids: Any, vectors: Any) -> dict[str, Any]:
    named = {"ids": ids.astype("<i8"), "vectors": vectors.astype("<f4")}
    return {"dim": vectors.shape[1]} | {k: base64.b64encode(v.tobytes()).decode() for k, v in named.items()}


def _check_vectors(fs: Any, root: str, manifest: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    try:
        ids, vectors = _vectors(fs, root, manifest)
    except (FileNotFoundError, ValueError) as error:
        return [f"a shard cannot be read: {error}"]
    clean_ids = np.frombuffer(base64.b64decode(reference["ids"]), "<i8")
    clean = np.frombuffer(base64.b64decode(reference["vectors"]), "<f4").reshape(-1, reference["dim"])
    if not np.array_equal(ids, clean_ids):
        return ["other vectors than in the clean run"]
    worst = float(np.abs(vectors - clean).max())
    return [f"vectors differ from the clean run's by up to {worst}"] if worst > TOLERANCE else []


def _difference(manifest: dict[str, Any], clean: dict[str, Any]) -> str:
    """Name the first shard of which something else is said, and what, or the facts about the whole."""
    for ours, theirs in zip(manifest["shards"], clean["shards"], strict=False):
        if ours != theirs:
            return "; ".join(f"{k} {ours[k]}, not {theirs[k]}" for k in ours if ours[k] != theirs[k])
    return "; ".join(
        f"{k} {manifest[k]}, not {clean[k]}" for k in clean if k != "shards" and manifest[k] != clean[k]
    )


def _check_left_over(
    fs: Any, root: str, names: set[str], manifest: dict[str, Any], died_after: float | None
) -> list[str]:
    """What lies there must be live, or dead for less than the grace; leases and markers are gone."""
    live = {fact["path"] for fact in file_facts(manifest)}
    dead = {n for n in names if n.startswith(DATA)} - live
    since = read_json(fs, f"{root}/{RETIRED}")["since"] if RETIRED in names else {}
    broken = [f"left over: {n}" for n in sorted(dead - since.keys())]
    broken += [f"left over: {n}" for n in sorted(names) if n.startswith(("done/", "work/"))]
    broken += [f"{RETIRED} names what is not there, or is live: {n}" for n in sorted(since.keys() - dead)]
    broken += [
        f"{n}: has been dead for longer than the grace"
        for n, died in since.items()
        if died_after is None or died < died_after
    ]
    broken += [f"lease not given back: {n}" for n in sorted(names) if n.endswith("lease.json")]
    if JOURNAL not in names:
        broken.append(f"there is no journal {JOURNAL}")
    return broken


def _check_changes(fs: Any, root: str, names: set[str], manifest: dict[str, Any]) -> list[str]:
    """The changes lead from nothing to the manifest, in what they say and in what they add up to.

    One whose ``after`` is neither the next one's ``before`` nor the manifest never was.
    """
    paths = sorted(n for n in names if n.startswith("changes/"))
    changes = [read_json(fs, f"{root}/{path}") for path in paths]
    if [f"changes/{change['number']:06d}.json" for change in changes] != paths:
        return [f"changes: their numbers are not those of their names {paths}"]
    published = digest_of(fs.cat_file(f"{root}/manifest.json"))
    follows = [*(change["before"] for change in changes[1:]), published]
    real = [c for c, following in zip(changes, follows, strict=True) if c["after"] == following]
    links = [None, *(change["after"] for change in real)]
    if [change["before"] for change in real] != links[:-1] or links[-1] != published:
        return [f"changes: {paths} do not lead from nothing to the manifest"]
    shards: set[str] = set()
    width = 0
    for change in real:
        shards = (shards - set(change["removed"])) | set(change["added"])
        width += sum(stop - start for start, stop in change["added_ids"])
        width -= sum(stop - start for start, stop in change["removed_ids"])
    broken = []
    if shards != {s["embeddings"]["path"] for s in manifest["shards"] if s["embeddings"]}:
        broken.append("changes: the shards that they add and remove do not come to those of the manifest")
    if width != sum(s["unit"]["n_rows"] for s in manifest["shards"]) << ROW_BITS:
        broken.append("changes: the ranges of ids do not come to the rows of the manifest")
    return broken


def _index_files(fs: Any, root: str, foreign: frozenset[str]) -> dict[str, str] | None:
    """Return the sha256 of each file of the index by name; empty for those that tell the time."""
    names = names_below(fs, f"{root}/index", foreign)
    if "index.json" not in names:
        return None
    told = {JOURNAL, "index.json", "report.html", "report.json"}
    return {n: "" if n in told else sha256(fs.cat_file(f"{root}/index/{n}")) for n in names}


def _rows(fs: Any, root: str, manifest: dict[str, Any]) -> list[str]:
    """Return place and id of each row, in shards and among the rejected, as far as they can be read."""
    rows = []
    for fact in file_facts(manifest):
        try:
            table = read_table(fs, f"{root}/{fact['path']}")
        except (FileNotFoundError, ValueError):
            continue
        columns = (table["vector_id"].to_pylist(), table["passage_id"].to_pylist())
        rows += [f"{place} {name}" for place, name in zip(*columns, strict=True)]
    return rows
