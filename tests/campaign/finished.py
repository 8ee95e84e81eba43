"""Finished folders made by hand, as the jobs leave them, for tests to plant faults in."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.campaign.checks.findings import sha256
from tests.campaign.checks.reports import digest_of
from tests.campaign.corpus import QUERY_LINES
from tests.campaign.jobs import Asked
from tests.campaign.moments import SEARCH

UNITS = (40, 30, 20)
K = 3


def write(path: Path, data: bytes) -> dict[str, Any]:
    """Write a file; returns its fact, without the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return {"path": path.name, "bytes": len(data), "sha256": sha256(data)}


def write_json(path: Path, content: Any) -> bytes:
    data = (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()
    write(path, data)
    return data


def write_table(path: Path, columns: dict[str, list[Any]]) -> dict[str, Any]:
    sink = io.BytesIO()
    table = pa.table(columns)
    pq.write_table(table, sink)
    return write(path, sink.getvalue()) | {"rows": len(table)}


def write_report(folder: Path, job: str, key: str, files: list[dict[str, Any]], **more: Any) -> None:
    facts = {"job": job, "key": key, "complete": True, "outcome": "complete", "files": files}
    write(folder / "report.html", b"<!doctype html><html></html>")
    write_json(folder / "report.json", facts | more)


def make_dataset(root: Path, moved: float = 0.0) -> None:
    """Write a data set of some units, published in two steps, and an index of it.

    Args:
        root: its folder.
        moved: by how much the vectors of its second object differ from what they are by default.
    """
    shards = []
    for number, rows in enumerate(UNITS):
        ids = [number << 41 | row << 13 for row in range(rows)]
        path = f"embeddings/{number:08d}-{0:010d}.parquet"
        columns = {"vector_id": ids, "passage_id": [f"{number}-{row}" for row in range(rows)]}
        columns["embedding"] = [[row / rows, 0.5 + moved * (number == 1)] for row in range(rows)]
        fact = write_table(root / path, columns) | {"path": path}
        unit = {"object_no": number, "first_row": 0, "n_rows": rows}
        shards.append({"unit": unit, "embeddings": fact, "rejected": None})
    manifests = [_manifest(shards[:2]), _manifest(shards)]
    digests = [digest_of(write_json(root / "manifest.json", manifest)) for manifest in manifests]
    for number, (before, added) in enumerate([(None, shards[:2]), (digests[0], shards[2:])]):
        change = {
            "number": number + 1,
            "before": before,
            "after": digests[number],
            "added": [shard["embeddings"]["path"] for shard in added],
            "removed": [],
            "added_ids": [_ids(shard["unit"]) for shard in added],
            "removed_ids": [],
        }
        write_json(root / f"changes/{number + 1:06d}.json", change)
    write_json(root / "_bge_ray.json", {"owner": "dataset"})
    write_report(root, "embed", digests[1], [])
    index = write(root / "index" / "0123456789abcdef" / "index.faiss", b"index") | {"rows": sum(UNITS)}
    index["path"] = "0123456789abcdef/index.faiss"
    write_json(root / "index" / "index.json", {"inputs": "key", "files": [index]})
    write_report(root / "index", "index", "key", [index])


def make_run(root: Path, asked: Asked) -> None:
    """Write the run files of a search that is reranked as far as it is asked for."""
    queries = [f"q-{number}" for number in range(4)]
    tags = [asked.tag, f"{asked.tag}-reranked"]
    files = []
    for folder, tag, depth in zip(asked.folders(str(root)), tags, (K, asked.depth), strict=False):
        rows = [(q, f"{q}:{rank}", rank, 1.0 / rank, tag) for q in queries for rank in range(1, depth + 1)]
        files += write_run(Path(folder), rows)
    left_out = [(f"bad-{number}", None, "empty_text") for number in range(QUERY_LINES - len(queries))]
    names = ("query_id", "passage_id", "reason")
    columns = {n: list(c) for n, c in zip(names, zip(*left_out, strict=True), strict=True)}
    files.append(write_table(root / "run" / "rejected.parquet", columns))
    files[-1]["path"] = "rejected.parquet"
    assert asked.job == SEARCH
    write_report(
        root / "run",
        "search",
        "key",
        files,
        settings={"rerank": {"depth": asked.depth}},
        queries_in=QUERY_LINES,
        queries_out=len(queries),
        results=K * len(queries),
        scoring={"pairs_out": asked.depth * len(queries), "pairs_rejected": 0},
    )


def write_run(folder: Path, rows: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Write both forms of a run and its journal; returns the facts of the run files, by full path."""
    names = ("query_id", "passage_id", "rank", "score", "tag")
    table = {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    lines = [f"{q} Q0 {passage} {rank} {score!r} {tag}\n" for q, passage, rank, score, tag in rows]
    write_json(folder / "_bge_ray.json", {"owner": "run"})
    parquet = write_table(folder / "run.parquet", table)
    trec = write(folder / "run.trec", "".join(lines).encode()) | {"rows": len(rows)}
    return [fact | {"path": f"file://{folder / fact['path']}"} for fact in (parquet, trec)]


def asked_to_rerank() -> Asked:
    """Return a search with the reranked run in its default folder, as `make_run` writes it."""
    return dataclasses.replace(Asked(SEARCH, exact=True, reranks=True), k=K, depth=2)


def _manifest(shards: list[dict[str, Any]]) -> dict[str, Any]:
    rows = sum(shard["unit"]["n_rows"] for shard in shards)
    return {"rows_in": rows, "rows_out": rows, "rows_rejected": 0, "tokens": 5 * rows, "shards": shards}


def _ids(unit: dict[str, int]) -> list[int]:
    start = unit["object_no"] << 41
    return [start, start + (unit["n_rows"] << 13)]
