"""What a dry run measures: the texts as they will be embedded, of units from all over the corpus."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy.typing as npt
import pytest
from transformers import AutoTokenizer

from bge_ray.dataset.folder import Dataset
from bge_ray.model.feed.chunks import Chunker
from bge_ray.model.run.model import Model
from bge_ray.model.run.result import Result
from bge_ray.model.spec import resolve_encoder, text_feeder
from bge_ray.pipeline.embed import estimate
from bge_ray.pipeline.embed.estimate import SAMPLE_ROWS, measure_task, sample_task
from bge_ray.pipeline.embed.planning import extend_plan, scan_task, settle_limits
from bge_ray.pipeline.embed.prepare import Planned, _subtract, settle_chunking
from bge_ray.pipeline.embed.tasks import CorpusUnit, SpanTask
from bge_ray.pipeline.engine.pools import Pool, Sizes, Tasks
from bge_ray.records.columns import Columns
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.plan import Removal
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import (
    BatchingSettings,
    ChunkingSettings,
    CorpusSettings,
    ModelSettings,
    Settings,
)
from bge_ray.storage.objects import Storage
from tests.support.reading import jsonl_bytes, resolve, scan

POOL = Pool(1, 1.0, 0.0, 1)


def test_tokens_are_those_of_the_texts_with_their_instruction(tiny_model: Path) -> None:
    texts = [f"passage number {i} " * (1 + i % 7) for i in range(40)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for instruction in ("", "represent this passage for retrieval: "):
        asked = ModelSettings(name=str(tiny_model), passage_instruction=instruction)
        spec = resolve_encoder(asked, on_gpu=False)
        expected = [
            len(tokenizer(instruction + text, truncation=True, max_length=spec.max_length)["input_ids"])
            for text in texts
        ]
        sample = [("", text, text) for text in texts]
        measured = measure_task(spec, None, sample, POOL, 64, False)
        assert measured is not None
        assert measured.tokens == sum(expected) / len(expected)
        assert (measured.pieces, measured.runs) == (1, 1)
        assert measured.rate > 0
    assert measure_task(spec, None, [], POOL, 64, False) is None


def test_the_rate_is_of_all_of_the_sample(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of it say little of the others, which are sorted by length."""
    spec = resolve_encoder(ModelSettings(name=str(tiny_model)), on_gpu=False)
    timed: list[int] = []

    class Watched(Model):
        def run(self, tokens: PackedTokens, batches: Sequence[npt.NDArray], result: Result) -> None:
            timed.append(sum(len(batch) for batch in batches))
            super().run(tokens, batches, result)

    monkeypatch.setattr("bge_ray.model.run.model.Model", Watched)
    sample = [("", text, text) for text in (f"passage {i} " * (1 + i % 9) for i in range(50))]
    assert measure_task(spec, None, sample, POOL, 64, False) is not None
    assert timed[-1] == len(sample)


def test_chunks_are_counted_as_they_will_be(tiny_model: Path) -> None:
    rules = settle_chunking(
        ChunkingSettings(max_tokens=24),
        spec := resolve_encoder(ModelSettings(name=str(tiny_model)), on_gpu=False),
    )
    bodies = [f"the quick brown fox number {i} jumps. " * (1 + i % 5) for i in range(20)]
    chunks = Chunker(text_feeder(spec), rules).cut([""] * 20, bodies)
    measured = measure_task(spec, rules, [("", body, body) for body in bodies], POOL, 64, False)
    assert measured is not None
    assert measured.tokens == int(chunks.tokens.lengths.sum()) / 20
    assert measured.pieces == len(chunks.numbers) / 20 > 1


def test_on_a_gpu_the_sample_is_repeated_until_a_second_is_full(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = resolve_encoder(ModelSettings(name=str(tiny_model)), on_gpu=False)
    monkeypatch.setattr(Pool, "device", "cpu")  # a GPU as far as its time is concerned
    monkeypatch.setattr(estimate, "GPU_SAMPLE_S", 0.2)
    sample = [("", f"text {i}", f"text {i}") for i in range(4)]
    measured = measure_task(spec, None, sample, dataclasses.replace(POOL, gpus=1.0), "auto", False)
    assert measured is not None
    assert measured.runs > 2
    base = estimate.Estimate(1, 1, 1, 1, 1, tokens=1, tokens_per_s=1.0, seconds=1.0, memory_bytes=1)
    base = dataclasses.replace(base, output_bytes=1, num_encoders=1)
    told = dataclasses.replace(base, sample_runs=37).lines()
    assert any("the median of 37 runs" in line for line in told)
    assert not any("shared" in line for line in told)
    assert any("texts elsewhere" in line for line in dataclasses.replace(base, shares=True).lines())


def test_small_objects_are_sampled_until_there_are_rows_enough(storage: Storage, tmp_path: Path) -> None:
    spans = []
    for number in range(5):
        rows = [{"id": str(i), "text": f"{number} {i}"} for i in range(3 if number else 2000)]
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(jsonl_bytes(rows))
        scanned, _ = scan(storage, str(path))
        found = scanned.under(number)
        [unit], columns = found.units(), resolve(scanned)
        spans.append(SpanTask(found, found.spans[0], (CorpusUnit(unit, "f", found.uri),)))
    small = sample_task(storage, spans[1:], columns)
    assert [text for _, _, text in small] == [f"{number} {i}" for number in range(1, 5) for i in range(3)]
    # No unit is all of the sample, however large it is.
    mixed = sample_task(storage, spans, columns)
    assert len(mixed) < SAMPLE_ROWS
    assert {text.split()[0] for _, _, text in mixed} == {"0", "1", "2", "3", "4"}


class InThisProcess:
    """As much of Ray as an estimate takes: tasks that run where they are called; ``ran`` says which did."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def remote(self, **_: object) -> Callable[[Callable], SimpleNamespace]:
        def task(function: Callable) -> SimpleNamespace:
            def run(*words: object) -> object:
                self.ran.append(function.__name__)
                return function(*words)

            return SimpleNamespace(remote=run)

        return task

    def get(self, result: object) -> object:
        return result


def test_many_small_objects_cost_what_committing_them_takes(
    storage: Storage, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their texts are nothing, and still 1,000 of them took a minute, which the dry run called 0 s."""
    n = 300
    for number in range(n):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl_bytes([{"id": "1", "text": f"text {number}"}]))
    spec = DatasetSpec(
        resolve_encoder(ModelSettings(name=str(tiny_model)), on_gpu=False), Columns("id", "text", None)
    )
    settings, listed = CorpusSettings(uri=str(tmp_path)), storage.list_files(str(tmp_path))
    limits = settle_limits(BatchingSettings(), listed, 1, spec.model)
    plan = extend_plan({}, None, scan_task(storage, listed, settings, limits), spec.columns, limits)
    todo, _ = _subtract(spec, plan, {}, {})
    planned = Planned(Dataset(storage, str(tmp_path / "out")), spec, plan, 0, {}, todo, Removal())
    sizes = Sizes({"encoders": POOL}, {"readers": Tasks(1, 0.0)})
    there = InThisProcess()
    monkeypatch.setattr(estimate, "ray", there)
    told = estimate.estimate(planned, sizes, Settings())
    assert (told.units_todo, told.rows_todo) == (n, n)
    # On a disk a unit takes 4.4 ms of a core at the least (docs/measured.md).
    assert told.seconds - told.tokens / told.tokens_per_s > n * 0.0044
    # Both hold the texts, which may be gigabytes: the driver has none of them.
    assert there.ran == [sample_task.__name__, measure_task.__name__]
