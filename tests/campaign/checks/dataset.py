"""The guarantees of a data set and its index, checked on what lies in the store."""

import json
from collections import Counter
from typing import Any

from tests.campaign.checks.findings import Findings, check_fact, names_below, read_json, read_table, sha256
from tests.campaign.checks.reports import check_report, digest_of, file_facts

DATA = ("embeddings/", "rejected/")
JOURNAL, RETIRED = "_bge_ray.json", "_retired.json"
ROW_BITS = 13


def snapshot(fs: Any, root: str) -> dict[str, Any]:
    """Return what a finished data set is, index included: to compare others with.

    Raises:
        AssertionError: it is itself not sound.
    """
    manifest = read_json(fs, f"{root}/manifest.json")
    reference = {
        "manifest": fs.cat_file(f"{root}/manifest.json").decode(),
        "rows": Counter(_rows(fs, root, manifest)),
        "index": _index_files(fs, root, frozenset()),
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
    if text != expected:
        what = _difference(manifest, json.loads(expected))
        found.broken.append(f"the manifest is not that of the clean run: {what}")
    for fact in file_facts(manifest):
        found.broken += check_fact(fs, f"{root}/{fact['path']}", fact)
    rows, clean = Counter(_rows(fs, root, manifest)), Counter(reference["rows"])
    found.rows = sum(rows.values())
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
    if files != reference["index"]:
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
