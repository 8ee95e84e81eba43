"""Rows of a work unit as they were read, and the check that accepts or rejects each of them.

One check serves every file format: a reader delivers `RawRows`, `check_rows` splits them into
`Passages` and `Rejected`, and no row is in both or in neither.
"""

import unicodedata
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from bge_ray.errors import ModelError
from bge_ray.records.ids import IdArray

MAX_DETAIL_CHARS = 300
_UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Zs"}  # Unicode's categories of controls, formats and separators


@dataclass(frozen=True)
class RawRows:
    """Rows of one unit, unchecked; every list has one entry a row.

    ``faults`` holds (reason, detail) of rows that could not be parsed; their other entries are None.
    """

    ids: list[object]
    texts: list[object]
    titles: list[object] | None
    kept: dict[str, pa.Array]
    faults: dict[int, tuple[str, str]]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Passages:
    """The accepted rows: ``rows`` are (n,) int64 positions within the unit, ascending.

    ``texts`` are title and text joined, as a model reads them whole; ``bodies`` and ``titles`` the two as
    they stand in the corpus, "" for no title.
    """

    rows: IdArray
    passage_ids: list[str]
    texts: list[str]
    bodies: list[str]
    titles: list[str]
    kept: dict[str, pa.Array]


@dataclass(frozen=True)
class Rejected:
    """One row left out, by its position within the unit."""

    row: int
    passage_id: str | None
    reason: str
    detail: str


def check_rows(rows: RawRows) -> tuple[Passages, list[Rejected]]:
    """Accept each row or reject it with a reason; accepted plus rejected equals the rows given.

    Title and text are joined with one space and stripped, as FlagEmbedding's evaluation does
    (``abc/evaluation/searcher.py``); a row without a title is its text unchanged.
    """
    accepted: list[int] = []
    passage_ids: list[str] = []
    texts: list[str] = []
    bodies: list[str] = []
    titles: list[str] = []
    rejected: list[Rejected] = []
    seen: set[str] = set()
    for row in range(len(rows)):
        passage_id, fault = _passage_id(rows.ids[row])
        fault = rows.faults.get(row) or fault
        title = rows.titles[row] if rows.titles is not None else None
        text, text_fault = _passage_text(rows.texts[row], title)
        fault = fault or text_fault
        if fault is None and passage_id in seen:
            fault = ("duplicate_id", f"passage id {passage_id!r} stands earlier in the same work unit")
        if fault is not None:
            rejected.append(Rejected(row, passage_id, fault[0], fault[1][:MAX_DETAIL_CHARS]))
            continue
        if passage_id is None or text is None:
            raise AssertionError(f"row {row} passed the checks without an id or a text")
        seen.add(passage_id)
        accepted.append(row)
        passage_ids.append(passage_id)
        texts.append(text)
        bodies.append(str(rows.texts[row]))
        titles.append("" if title is None else str(title))
    positions = np.asarray(accepted, dtype=np.int64)
    kept = {name: column.take(pa.array(positions)) for name, column in rows.kept.items()}
    return Passages(positions, passage_ids, texts, bodies, titles, kept), rejected


def take_passages(passages: Passages, keep: IdArray) -> Passages:
    """Return the passages at the given (m,) int64 positions among the accepted ones."""
    return Passages(
        rows=passages.rows[keep],
        passage_ids=[passages.passage_ids[i] for i in keep],
        texts=[passages.texts[i] for i in keep],
        bodies=[passages.bodies[i] for i in keep],
        titles=[passages.titles[i] for i in keep],
        kept={name: column.take(pa.array(keep)) for name, column in passages.kept.items()},
    )


def _passage_id(value: object) -> tuple[str | None, tuple[str, str] | None]:
    if value is None:
        return None, ("null_id", "the id is null or missing")
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None, ("non_string_id", f"the id is a {type(value).__name__}, expected a string or an integer")
    text = str(value)
    if not text.strip():
        return None, ("null_id", "the id is empty")
    if (fault := unicode_fault(text)) is not None:
        return None, fault
    return text, None


def _passage_text(text: object, title: object) -> tuple[str | None, tuple[str, str] | None]:
    if text is None:
        return None, ("null_text", "the text is null or missing")
    if not isinstance(text, str):
        return None, ("non_string_text", f"the text is a {type(text).__name__}")
    if title is not None and not isinstance(title, str):
        return None, ("non_string_text", f"the title is a {type(title).__name__}")
    joined = text if title is None else f"{title} {text}".strip()
    if is_blank(joined):
        return None, ("empty_text", "nothing but white space and characters that nobody sees")
    if (fault := unicode_fault(joined)) is not None:
        return None, fault
    return joined, None


def is_blank(text: str) -> bool:
    """Tell whether nothing of a text is seen: no tokenizer makes more of it than of no text at all.

    White space, control characters, and what formats others, such as a space of no width. The first character
    that is seen decides, so a long text costs no more than a short one.
    """
    return all(unicodedata.category(letter) in _UNSEEN for letter in text.strip())


def folded(text: str) -> str:
    """Return what two texts have in common that differ by case and white space alone."""
    return " ".join(text.casefold().split())


def unicode_fault(text: str) -> tuple[str, str] | None:
    """Return the reason and detail why a text is none, or None.

    Lone surrogates cannot be stored as UTF-8; undecodable bytes arrive as such, too.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return "invalid_unicode", f"not valid Unicode at character {error.start}: {error.reason}"
    return None


def refuse_no_query(text: object) -> None:
    """Refuse what has no vector as a query.

    Raises:
        ModelError: it is no text, not valid Unicode, or nothing of it is seen.
    """
    if not isinstance(text, str):
        raise ModelError(f"query {text!r}: is no text")
    if (fault := unicode_fault(text)) is not None:
        raise ModelError(f"query {text[:60]!r}: no vector: {fault[1]}")
    if is_blank(text):
        raise ModelError(f"query {text!r}: no vector: it says nothing, and would find what does neither")
