"""Training examples as FlagEmbedding has them, a query and its positives a line; the unfit are left out."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bge_ray.errors import CorpusError
from bge_ray.formats.candidate_table import QUERY_ID_COLUMNS
from bge_ray.formats.candidates import Reject
from bge_ray.formats.endings import ending_of
from bge_ray.formats.lines import read_text_lines
from bge_ray.formats.rows import is_blank, unicode_fault
from bge_ray.storage.objects import ObjectInfo, Storage

# What else a line may say of how it is to be trained on.
_LABELS = ("prompt", "type")


@dataclass(frozen=True)
class Example:
    """A query and its positives: ``texts``, and their ``passage_ids`` where the line has ``pos_id``.

    ``labels`` holds the line's ``prompt`` and ``type``, those that it has. ``positive_scores`` and
    ``negative_scores`` are a teacher's, one a text; None where the line has none. ``place`` is where the line
    stands.
    """

    query_id: str
    query: str
    passage_ids: list[str]
    texts: list[str]
    negatives: list[str]
    labels: dict[str, Any]
    positive_scores: list[float] | None = None
    negative_scores: list[float] | None = None
    place: str = ""


def read_examples(storage: Storage, uri: str, reject: Reject) -> Iterator[Example]:
    """Yield the examples of a file, folder or glob of JSONL with ``query`` and ``pos``.

    The id of a query without one is the number of its line, behind the name of its file where there are
    several.

    Args:
        storage: where to read.
        uri: of the input.
        reject: told of every line that is left out.

    Raises:
        CorpusError: nothing is there, or an object is no JSONL.
    """
    infos = storage.list_files(uri)
    if not infos:
        raise CorpusError(f"{uri}: no such file or folder, or an empty one")
    seen: set[str] = set()
    for info in infos:
        if ending_of(info.uri).format != "jsonl":
            raise CorpusError(f"{info.uri}: training examples are .jsonl or .json files, one object a line")
        stem = f"{info.uri.rpartition('/')[2]}:" if len(infos) > 1 else ""
        for example in _read_object(storage, info, stem, reject):
            if example.query_id in seen:
                reject(example.query_id, None, "duplicate_query", f"{example.place}: the id stands earlier")
                continue
            seen.add(example.query_id)
            yield example


def _read_object(storage: Storage, info: ObjectInfo, stem: str, reject: Reject) -> Iterator[Example]:
    for line in read_text_lines(storage, info):
        place = f"{info.uri}: {line.place}"
        try:
            record = json.loads(line.text or "")
        except (ValueError, RecursionError) as error:
            reject(None, None, "malformed", f"{place}: {line.fault or f'not JSON: {error}'}")
            continue
        fault = _fault(record)
        if fault is not None:
            reject(None, None, fault[0], f"{place}: {fault[1]}")
            continue
        given = [record[name] for name in QUERY_ID_COLUMNS if record.get(name) is not None]
        yield Example(
            query_id=str(given[0]) if given else f"{stem}{line.number}",
            query=record["query"],
            passage_ids=[str(passage_id) for passage_id in record.get("pos_id") or ()],
            texts=record["pos"],
            negatives=record.get("neg") or [],
            labels={name: record[name] for name in _LABELS if record.get(name) is not None},
            positive_scores=_scores(record, "pos"),
            negative_scores=_scores(record, "neg"),
            place=place,
        )


def _scores(record: dict[str, Any], side: str) -> list[float] | None:
    scores = record.get(f"{side}_scores")
    return None if scores is None else [float(score) for score in scores]


def _fault(record: Any) -> tuple[str, str] | None:
    """Return why a record is no example, or None."""
    if not isinstance(record, dict):
        return "malformed", "expected a JSON object"
    query, pos, ids = record.get("query"), record.get("pos"), record.get("pos_id")
    if not isinstance(query, str) or is_blank(query):
        return "empty_query", "query is missing, no text, or nothing but white space"
    if (fault := _text_fault(record)) is not None:
        return fault
    if not pos:
        return "no_positive", "pos is missing or empty"
    if ids is not None and (not isinstance(ids, list) or len(ids) != len(pos)):
        return "malformed", "expected pos_id to have one id for each text of pos"
    for name in ("pos", "neg"):
        scores = record.get(f"{name}_scores")
        if scores is not None and not _are_scores(scores, len(record.get(name) or [])):
            return "malformed", f"expected {name}_scores to have one finite number for each text of {name}"
    return None


def _text_fault(record: dict[str, Any]) -> tuple[str, str] | None:
    """Return why passages or prompt of a record are no texts, or that some text of it is no Unicode."""
    found = [record["query"]]
    for name in ("pos", "neg"):
        texts = record.get(name) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return "malformed", f"expected {name} to be a list of texts"
        if any(is_blank(text) for text in texts):
            return "malformed", f"{name} has a text of which nothing is seen"
        found += texts
    prompt = record.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        return "malformed", "expected prompt to be a text"
    return next(filter(None, map(unicode_fault, [*found, prompt or ""])), None)


def _are_scores(scores: Any, count: int) -> bool:
    """Tell whether these are as many finite numbers; JSON as Python reads it knows NaN."""
    return (
        isinstance(scores, list)
        and len(scores) == count
        and all(type(score) in (int, float) and math.isfinite(score) for score in scores)
    )
