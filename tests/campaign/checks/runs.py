"""The guarantees of a search or rerank run, checked on what lies in its folders."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tests.campaign.checks.findings import names_below, read_json, read_table, sha256
from tests.campaign.checks.reports import check_report
from tests.campaign.corpus import QUERY_LINES
from tests.campaign.jobs import Asked
from tests.campaign.moments import RERANK, SEARCH

# Beside these a folder of ours holds nothing.
OUR_FILES = {
    "_bge_ray.json",
    "rejected.parquet",
    "report.html",
    "report.json",
    "run.parquet",
    "run.trec",
}
TOLERANCE = 1e-5
RUN_COLUMNS = ("query_id", "passage_id", "rank", "score", "tag")

Row = tuple[Any, ...]


def run_snapshot(fs: Any, asked: Asked, root: str) -> dict[str, Any]:
    """Return what a finished run is, by the names of its folders: to compare others with.

    Raises:
        AssertionError: it is itself not sound.
    """
    folders = asked.folders(root)
    reference = {
        "rows": [_rows(fs, folder) for folder in folders],
        "rejected": _rejected(fs, folders[0]),
        "sha256": [_sha256(fs, folder) for folder in folders],
    }
    broken, _ = check_run(fs, asked, root, reference, frozenset())
    assert not broken, broken
    return reference


def check_run(
    fs: Any, asked: Asked, root: str, reference: dict[str, Any], foreign: frozenset[str]
) -> tuple[list[str], list[bool]]:
    """Compare a finished run with the `run_snapshot` of an undisturbed one.

    Returns:
        What is broken; and for each folder whether its run.parquet has the very bytes of the clean run's.
    """
    folders = asked.folders(root)
    if missing := [path for path in _must_be(folders) if not fs.exists(path)]:
        return [f"{path}: missing" for path in missing], []
    broken = check_report(fs, folders[0])
    for folder, tag, rows in zip(folders, _tags(asked), reference["rows"], strict=True):
        broken += _check_rows(fs, folder, tag, rows) + _check_nothing_else(fs, folder, foreign)
    rejected = _rejected(fs, folders[0])
    if Counter(map(tuple, rejected)) != Counter(map(tuple, reference["rejected"])):
        broken.append(f"{folders[0]}: other rejected rows than in the clean run: {rejected}")
    if not all(reason for *_, reason in rejected):
        broken.append(f"{folders[0]}: a rejected row without a reason")
    report = read_json(fs, f"{folders[0]}/report.json")
    named = {fact["path"].rpartition("/")[2] for fact in report["files"]}
    if (
        named != {"run.parquet", "run.trec", "rejected.parquet"}
        or len(report["files"]) != 2 * len(folders) + 1
    ):
        broken.append(f"{folders[0]}/report.json does not name every file of the run: {report['files']}")
    counted = [len(_rows(fs, folder)) for folder in folders]
    broken += _check_search(fs, folders[0], report, counted, rejected) if asked.job == SEARCH else []
    broken += _check_rerank(fs, root, asked, report, counted, rejected) if asked.job == RERANK else []
    same = [_sha256(fs, folder) for folder in folders]
    return broken, [a == b for a, b in zip(same, reference["sha256"], strict=True)]


def _must_be(folders: list[str]) -> Iterable[str]:
    for folder in folders:
        yield from (f"{folder}/{name}" for name in ("run.parquet", "run.trec", "_bge_ray.json"))
    yield from (f"{folders[0]}/{name}" for name in ("rejected.parquet", "report.json", "report.html"))


def _tags(asked: Asked) -> list[str]:
    return [asked.tag, f"{asked.tag}-reranked"] if asked.reranks else [asked.tag]


def _check_rows(fs: Any, folder: str, tag: str, reference: list[Row]) -> list[str]:
    """Compare rows with the clean run's, and check that they are a run, in either form."""
    rows = _rows(fs, folder)
    broken = []
    if [row[:2] for row in rows] != [tuple(row[:2]) for row in reference]:
        lost = set(map(tuple, (row[:2] for row in reference))) - {row[:2] for row in rows}
        more = len(rows) - len({row[:2] for row in rows})
        broken.append(
            f"{folder}: other passages, or in another order, than in the clean run: {len(rows)} rows, not "
            f"{len(reference)}; {len(lost)} pairs lost, {more} doubled"
        )
    elif worst := [a for a, b in zip(rows, reference, strict=True) if abs(a[3] - b[3]) > TOLERANCE]:
        broken.append(f"{folder}: {len(worst)} scores differ from the clean run's, the first of {worst[0]}")
    if any(row[4] != tag for row in rows):
        broken.append(f"{folder}: rows of another tag than {tag}")
    queries = [query for at, (query, *_) in enumerate(rows) if at == 0 or rows[at - 1][0] != query]
    if len(queries) != len(set(queries)):
        broken.append(f"{folder}: a query stands in two places")
    seen: Counter[str] = Counter()
    for query, _, rank, *_ in rows:
        seen[query] += 1
        if rank != seen[query]:
            broken.append(f"{folder}: the ranks of query {query} are not 1, 2, ...")
            break
    if _trec_rows(fs, folder) != rows:
        broken.append(f"{folder}: run.trec and run.parquet differ")
    return broken


def _check_nothing_else(fs: Any, folder: str, foreign: frozenset[str]) -> list[str]:
    """Leases are given back and work is swept; what is in the default folder of a reranked run is its own."""
    names = {n for n in names_below(fs, folder, foreign) if not n.startswith("reranked/")}
    return [f"left over: {folder}/{name}" for name in sorted(names - OUR_FILES)]


def _check_search(
    fs: Any, folder: str, report: dict[str, Any], counted: list[int], rejected: list[Row]
) -> list[str]:
    answered = len({row[0] for row in _rows(fs, folder)})
    left_out = sum(passage is None for _, passage, _ in rejected)
    told = (report["queries_in"], report["queries_out"], report["results"])
    broken = []
    if told != (QUERY_LINES, answered, counted[0]) or answered + left_out != QUERY_LINES:
        broken.append(
            f"{folder}: {QUERY_LINES} queries, {answered} answered with {counted[0]} results, {left_out} "
            f"rejected; the report says {told}"
        )
    if len(counted) == 2:
        depth = report["settings"]["rerank"]["depth"]
        lists = Counter(row[0] for row in _rows(fs, folder))
        pairs = sum(min(depth, n) for n in lists.values())
        unscored = sum(passage is not None for _, passage, _ in rejected)
        scoring = report["scoring"]
        told = (scoring["pairs_out"], scoring["pairs_rejected"])
        if told != (counted[1], unscored) or sum(told) != pairs:
            broken.append(f"{folder}: {pairs} pairs to score, the report says {told}, {counted[1]} are there")
    return broken


def _check_rerank(
    fs: Any, root: str, asked: Asked, report: dict[str, Any], counted: list[int], rejected: list[Row]
) -> list[str]:
    lists = Counter(row[0] for row in _rows(fs, f"{root}/run"))
    pairs = sum(min(asked.depth, n) for n in lists.values())
    unscored = sum(passage is not None for _, passage, _ in rejected)
    told = (report["pairs_in"], report["pairs_out"])
    if told != (pairs, counted[0]) or counted[0] + unscored != pairs:
        return [f"{pairs} pairs to score, {counted[0]} scored, {unscored} rejected; the report says {told}"]
    return []


def _rows(fs: Any, folder: str) -> list[Row]:
    table = read_table(fs, f"{folder}/run.parquet")
    return list(zip(*(table[name].to_pylist() for name in RUN_COLUMNS), strict=True))


def _trec_rows(fs: Any, folder: str) -> list[Row]:
    """Return the rows of run.trec as those of run.parquet; scores must come back to the last bit."""
    fields = [line.split() for line in fs.cat_file(f"{folder}/run.trec").decode().splitlines()]
    return [(q, passage, int(rank), float(score), tag) for q, _, passage, rank, score, tag in fields]


def _rejected(fs: Any, folder: str) -> list[Row]:
    table = read_table(fs, f"{folder}/rejected.parquet")
    return list(zip(*(table[n].to_pylist() for n in ("query_id", "passage_id", "reason")), strict=True))


def _sha256(fs: Any, folder: str) -> str:
    return sha256(fs.cat_file(f"{folder}/run.parquet"))
