"""The bench job on a few rows: a table with every figure it promises."""

import json
from pathlib import Path

import pytest

from bge_ray.bench.run import repeated, run_bench, to_markdown
from bge_ray.errors import SettingsError
from bge_ray.settings.sections import parse_settings
from tests.support.corpora import docstrings

OTHERS = ["FlagEmbedding", "Ray Data map_batches + sentence-transformers", "FlagReranker", "CrossEncoder"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.timeout(1200)
def test_a_small_bench_fills_its_tables(tmp_path: Path) -> None:
    keys = [
        "bench.rows=96",
        "bench.pairs=32",
        "bench.repeats=2",
        "bench.lengths=[natural, 32]",
        f"bench.leave_out={json.dumps(OTHERS)}",
        f"bench.output={tmp_path}",
    ]
    passages = docstrings(600)
    titles, texts = [p["title"] for p in passages], [p["text"] for p in passages]
    outcome = run_bench(parse_settings(None, keys), titles, texts)
    assert json.loads((tmp_path / "bench.json").read_text()) == outcome
    natural, fixed, pairs = (table["rows"] for table in outcome["tables"])
    job = natural["bge-ray job"]
    assert len(job["seconds"]) == 2
    assert 0 <= job["padding_waste"] < 1
    assert -0.1 < job["waited"] < 1
    assert fixed["bge-ray job"]["tokens_per_s"] == pytest.approx(32 * fixed["bge-ray job"]["rows_per_s"])
    assert "flash" in natural["sentence-transformers, flash attention"]["not_here"]
    assert list(pairs) == ["bge-ray reranker"]
    text = (tmp_path / "bench.md").read_text()
    assert text == to_markdown(outcome)
    assert "of its tokens are padding" in text


@pytest.mark.long
def test_a_contestant_that_fails_is_named_with_the_way_out(tmp_path: Path) -> None:
    from bge_ray.bench.run import _run_apart

    with pytest.raises(SettingsError, match="leave_out"):
        _run_apart("bge_ray.bench.contestants", "bge-ray bare loop", str(tmp_path / "no-such-task.json"))


def test_where_texts_are_too_few_they_come_again_in_another_order() -> None:
    texts = [str(i) for i in range(10)]
    assert repeated(texts, 4) == texts[:4]
    assert repeated(texts, 10) == texts
    many = repeated(texts, 1000)
    assert {many.count(text) for text in texts} == {100}
    assert all(len(set(many[i : i + 100])) == 10 for i in range(0, 1000, 100)), "some of all in every unit"
    assert many == repeated(texts, 1000)
