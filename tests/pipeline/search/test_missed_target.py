"""An index whose recall missed its target is not searched without a word."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest

import bge_ray
from bge_ray.errors import DatasetMismatchError, ModelError
from bge_ray.pipeline.search.job import SearchJob
from bge_ray.records.canonical import to_json
from bge_ray.records.index import SHARD_DIGITS, Recall, Shortfall
from tests.report.samples import index_description
from tests.support.searches import settings_for
from tests.support.vectors import make_dataset

DIM = 16
FOUND, RESCORED = Recall(10, 0.8, 0.75, 0.85), Recall(10, 0.97, 0.95, 0.98)
SAID = "recall@10 of its index is 0.8000, and index.recall_target asked for 0.95"


def publish(root: Path, **changes: Any) -> None:
    """Write a data set, and an index.json beside it as a build leaves it."""
    made = make_dataset(str(root), [40], DIM)
    facts = {
        "vector_fingerprint": made.spec.vector_fingerprint,
        "dim": DIM,
        "ntotal": 40,
        "shards": tuple(m.embeddings.sha256[:SHARD_DIGITS] for m in made.publish().shards),
        "recall": {"@10": FOUND},
        "reached": False,
        "recall_after_exact_reranking": RESCORED,
    }
    (root / "index").mkdir()
    (root / "index/index.json").write_bytes(to_json(index_description(**facts | changes)))


def planned(root: Path, **keys: Any) -> SearchJob:
    """A search that is planned as far as its model, which this data set has only by name."""
    (root / "q.jsonl").write_text('{"_id": "1", "text": "?"}\n')
    job = object.__new__(SearchJob)
    with pytest.raises(ModelError):
        job.__init__(
            settings_for(
                output__uri=str(root),
                search__queries=str(root / "q.jsonl"),
                search__output=f"{root}-run",
                **{"search__k": 10, **keys},
            )
        )
    return job


@pytest.mark.parametrize(
    ("index", "keys", "shortfall"),
    [
        ({}, {}, Shortfall(FOUND, 0.95, 100, 0.97)),
        ({}, {"search__rescore": 50}, Shortfall(FOUND, 0.95, 100, 0.97)),
        ({}, {"search__rescore": 100}, None),
        ({}, {"search__rescore": 100, "search__k": 20}, Shortfall(FOUND, 0.95, 200, 0.97)),
        ({"recall_after_exact_reranking": FOUND}, {"search__rescore": 100}, Shortfall(FOUND, 0.95)),
        ({"reached": True}, {}, None),
    ],
)
def test_a_search_says_so_when_it_begins_and_in_its_report(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    index: dict[str, Any],
    keys: dict[str, Any],
    shortfall: Shortfall | None,
) -> None:
    publish(tmp_path / "data", **index)
    with caplog.at_level(logging.WARNING):
        searched = planned(tmp_path / "data", **keys)._searched()
    assert searched is not None
    assert searched.shortfall == shortfall
    assert caplog.text.count(SAID) == (shortfall is not None)
    if shortfall is not None:
        way = "set search.rescore to" if shortfall.rescore else "build one with index.rescore"
        assert way in caplog.text


def test_an_exact_search_misses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(tmp_path / "data")
    with caplog.at_level(logging.WARNING):
        assert planned(tmp_path / "data", search__exact=True)._searched() is None
    assert SAID not in caplog.text


def test_one_that_lacks_passages_is_opened_for_questions_only_where_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path / "data", reached=True, shards=(), ntotal=0)
    root = str(tmp_path / "data")
    lacks = "40 of its 40 vectors (1 of 1 shards) are not in its index, which is older"
    with pytest.raises(DatasetMismatchError, match=rf"{re.escape(lacks)}, .* stale_index=True"):
        bge_ray.open_index(root)
    with caplog.at_level(logging.WARNING):
        index = bge_ray.open_index(root, stale_index=True)
    assert lacks in caplog.text and index.description is not None


def test_opening_it_for_questions_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(tmp_path / "data")
    publish(tmp_path / "good", reached=True)
    with caplog.at_level(logging.WARNING):
        bge_ray.open_index(str(tmp_path / "good"))
        assert not caplog.records
        bge_ray.open_index(str(tmp_path / "data"))
    assert f"{SAID}, 0.9700 with rescored=100" in caplog.text
