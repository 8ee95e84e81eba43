"""What a dry run measures: the texts as they will be embedded, of units from all over the corpus."""

from pathlib import Path

from transformers import AutoTokenizer

from bge_ray.model.spec import resolve_encoder
from bge_ray.pipeline.embed.estimate import SAMPLE_ROWS, measure_task, sample_task
from bge_ray.pipeline.embed.tasks import CorpusUnit, SpanTask
from bge_ray.pipeline.engine.pools import Pool
from bge_ray.settings.sections import ModelSettings
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
        measured = measure_task(spec, texts, POOL, 64, False)
        assert measured is not None
        tokens_per_row, rate = measured
        assert tokens_per_row == sum(expected) / len(expected)
        assert rate > 0
    assert measure_task(spec, [], POOL, 64, False) is None


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
    assert small == [f"{number} {i}" for number in range(1, 5) for i in range(3)]
    # No unit is all of the sample, however large it is.
    mixed = sample_task(storage, spans, columns)
    assert len(mixed) < SAMPLE_ROWS
    assert {text.split()[0] for text in mixed} == {"0", "1", "2", "3", "4"}
