"""The user's own queries for measuring recall are read as a search reads its queries."""

import json
from pathlib import Path

import pytest

from bge_ray.errors import CorpusError
from bge_ray.pipeline.index.queries import given_queries
from bge_ray.settings.sections import parse_settings
from bge_ray.storage.objects import Storage


def test_their_columns_are_those_of_the_search(storage: Storage, tmp_path: Path) -> None:
    rows = [{"key": f"q{i}", "_id": "same", "words": f"what is {i}", "text": "not this"} for i in range(5)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = [f"index.queries={tmp_path}/q.jsonl", "index.num_queries=4"]
    named = parse_settings(None, [*keys, "search.id_column=key", "search.text_column=words"])
    assert given_queries(storage, named).texts == ("what is 0", "what is 1", "what is 2", "what is 3")
    assert given_queries(storage, parse_settings(None, keys)).texts == ("not this",)
    missing = parse_settings(None, [*keys, "search.text_column=question"])
    with pytest.raises(CorpusError, match=r"q\.jsonl: none of question among its columns"):
        given_queries(storage, missing)
    assert given_queries(storage, parse_settings(None, [])) is None
