"""What becomes of a query whose positives fail on the way: it is named once, and no result is taken."""

from typing import Any

import pyarrow as pa
import pytest

from bge_ray.pipeline.mine.outputs import audit_rows
from bge_ray.pipeline.mine.stages import MINED_SCHEMA, RESULT_SCHEMA, _drawn, _for_each_query, _judged
from bge_ray.settings.sections import MineSettings


def row(passage_id: str | None, **values: Any) -> dict[str, Any]:
    empty = dict.fromkeys(RESULT_SCHEMA.names)
    return empty | {"row_no": 3, "query_id": "q", "query": "asked", "passage_id": passage_id} | values


def positive(**values: Any) -> dict[str, Any]:
    return row("p", verdict="positive", first_score=0.9, text="the answer", **values)


def result(name: str, score: float, **values: Any) -> dict[str, Any]:
    more = {"rank": 2, "cosine": 0.1, "same_text": False, "text": f"another text {name}"}
    return row(name, first_score=score, **more | values)


def whole(rows: list[dict[str, Any]], rules: MineSettings) -> list[tuple[str | None, str | None, str | None]]:
    judged = pa.Table.from_pylist(_judged(rows, rules), schema=RESULT_SCHEMA).to_pylist()
    for found in judged:
        if rules.teacher and found["text"] is not None and found["reason"] is None:
            found["score"] = found["first_score"] * 10
    drawn = _drawn(judged, rules)
    audit_rows(pa.Table.from_pylist(drawn, schema=MINED_SCHEMA))  # none is without a reason
    return [(found["passage_id"], found["verdict"], found["reason"]) for found in drawn]


def test_a_positive_whose_text_is_gone_takes_its_query_with_it() -> None:
    rows = [positive(reason="unreadable_text", detail="gone"), result("a", 0.5)]
    assert whole(rows, MineSettings()) == [
        ("p", "positive", "unreadable_text"),
        (None, None, "unknown_positive"),
    ]


def test_a_positive_beside_one_whose_text_is_gone_is_enough() -> None:
    rows = [positive(), {**positive(reason="unreadable_text"), "passage_id": "p2"}, result("a", 0.5)]
    assert ("a", "negative", None) in whole(rows, MineSettings())


def test_a_result_whose_text_is_gone_is_no_negative() -> None:
    rows = [positive(), result("a", 0.5, text=None, reason="unreadable_text"), result("b", 0.4)]
    assert whole(rows, MineSettings(negatives=5)) == [
        ("p", "positive", None),
        ("a", None, "unreadable_text"),
        ("b", "negative", None),
    ]


def test_a_query_whose_positives_the_teacher_cannot_score_is_given_up() -> None:
    rules = MineSettings(teacher=True)
    judged = _judged([positive(), result("a", 0.5)], rules)
    judged[0] |= {"reason": "killed_worker", "detail": "twice"}
    judged[1]["score"] = 1.0
    drawn = _drawn(judged, rules)
    assert [(found["passage_id"], found["reason"]) for found in drawn] == [
        ("p", "killed_worker"),
        (None, "unscored_positive"),
    ]


def test_only_what_may_be_a_negative_goes_to_the_teacher() -> None:
    rows = [positive(), result("copy", 0.5, text="the answer"), result("b", 0.4)]
    judged = _judged(rows, MineSettings(teacher=True))
    assert [found["passage_id"] for found in judged if found["text"] is not None] == ["p", "b"]


@pytest.mark.parametrize("sizes", [[1], [3, 1, 4, 1, 5], [9] * 40, []])
def test_queries_stay_whole_however_many_go_at_once(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bge_ray.pipeline.mine.stages.ROWS_AT_ONCE", 4)
    numbers = [number for number, size in enumerate(sizes) for _ in range(size)]
    table = pa.table({"row_no": pa.array(numbers, pa.int64())})
    seen = []

    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        seen.append([found["row_no"] for found in rows])
        return rows

    assert _for_each_query(table, change, table.schema)["row_no"].to_pylist() == numbers
    assert seen == [[number] * size for number, size in enumerate(sizes)]
