"""Runs: what is written as TREC is read again with the same numbers in the same order."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_ray.errors import CorpusError
from bge_ray.formats.candidates import Candidates, read_candidate_lists
from bge_ray.formats.runs import RUN_SCHEMA, encode_trec, sort_candidates
from bge_ray.storage.objects import Storage
from tests.support.reading import parquet_bytes

WORD = st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=5).filter(
    lambda text: text.split() == [text]
)
SCORE = st.floats(allow_nan=False) | st.sampled_from([0.5, 1.0])
RUN = st.dictionaries(WORD, st.dictionaries(WORD, SCORE, min_size=1, max_size=6), min_size=1, max_size=5)


def run_table(run: dict[str, dict[str, float]], tag: str = "bge") -> pa.Table:
    rows = [
        {
            "query_id": query_id,
            "passage_id": passage_id,
            "rank": rank,
            "score": scores[passage_id],
            "tag": tag,
        }
        for query_id, scores in run.items()
        for rank, passage_id in enumerate(scores, 1)
    ]
    return pa.Table.from_pylist(rows, schema=RUN_SCHEMA)


@settings(deadline=None, max_examples=30)
@given(run=RUN)
def test_a_run_comes_back_from_either_form(run, tmp_path_factory) -> None:
    storage = Storage(5.0)
    folder = tmp_path_factory.getbasetemp()
    expected = []
    for query_id, scores in run.items():
        ids = sorted(scores, key=lambda p: (-scores[p], p))
        assert [list(scores)[i] for i in sort_candidates(list(scores), list(scores.values()))] == ids
        expected.append(Candidates(query_id, ids, [scores[p] for p in ids]))
    table = run_table(run)
    for name, data in {"a.trec": encode_trec(table), "a.parquet": parquet_bytes(table)}.items():
        storage.write(str(folder / name), data)
        assert list(read_candidate_lists(storage, str(folder / name), refuse)) == expected


def refuse(*fault: object) -> None:
    raise AssertionError(fault)


def test_a_line_of_a_run() -> None:
    table = run_table({"q": {"a": 0.5, "b": 1 / 3}}, "t")
    assert encode_trec(table) == b"q Q0 a 1 0.5 t\nq Q0 b 2 0.3333333333333333 t\n"


@pytest.mark.parametrize("bad", ["a b", "", "a\tb", "a\u2003b"])
def test_an_id_that_breaks_the_line_is_refused(bad: str) -> None:
    for table in (
        run_table({"q": {bad: 1.0}}),
        run_table({bad: {"p": 1.0}}),
        run_table({"q": {"p": 1.0}}, bad),
    ):
        with pytest.raises(CorpusError, match="cannot stand in a TREC run"):
            encode_trec(table)
