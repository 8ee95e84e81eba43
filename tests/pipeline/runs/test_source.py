"""What a search or a rerank may write is never the corpus of the data set that it reads."""

from pathlib import Path

import pytest

from bge_ray.dataset.folder import Dataset
from bge_ray.errors import OutputCollisionError
from bge_ray.pipeline.runs.source import Source, refuse_in_source
from bge_ray.records.dataset import make_manifest
from bge_ray.records.plan import Plan
from bge_ray.storage.objects import Storage
from tests.support.records import make_spec


@pytest.mark.parametrize(
    ("corpus", "output", "refused"),
    [
        ("corpus", "corpus", True),
        ("corpus", "corpus/run", True),
        ("corpus/*.jsonl", "corpus/run", False),
        ("corpus/**/*.json*", "corpus/run", True),
        ("corpus/a.jsonl", "corpus", False),
        ("corpus", "run", False),
        ("", "corpus", False),
    ],
)
def test_an_output_in_the_corpus_of_the_newest_plan_is_refused(
    storage: Storage, tmp_path: Path, corpus: str, output: str, refused: bool
) -> None:
    source = Source(storage, str(tmp_path / "data"), make_spec(), make_manifest("d", []))
    dataset = Dataset(storage, source.root)
    outputs = {"search.output": str(tmp_path / output), "rerank.output": None}
    refuse_in_source(source, outputs)
    dataset.create_plan(1, Plan((), 0, str(tmp_path / "another")))
    dataset.create_plan(2, Plan((), 0, str(tmp_path / corpus) if corpus else ""))
    with pytest.raises(OutputCollisionError, match=r"inside the model of output\.uri"):
        refuse_in_source(source, {"search.output": f"{source.spec.model.name}/run"})
    if refused:
        with pytest.raises(OutputCollisionError, match=r"search\.output.* the corpus of output\.uri"):
            refuse_in_source(source, outputs)
    else:
        refuse_in_source(source, outputs)
