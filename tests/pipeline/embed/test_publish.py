"""A manifest vouches for files that are there; without Ray, on a data set whose units are all done."""

from pathlib import Path

import pytest

from bge_ray.errors import IncompleteRunError
from bge_ray.pipeline.embed.job import EmbedWork
from bge_ray.pipeline.embed.prepare import Planned
from bge_ray.records.plan import Coding, CorpusObject, Plan, Removal, Span
from bge_ray.report.facts import RunFacts
from bge_ray.settings.sections import Settings
from tests.support.vectors import VectorDataset, clustered

ROWS = 20


def test_shards_that_are_not_where_they_were_written_are_not_vouched_for(tmp_path: Path) -> None:
    """As where the output is a folder of one machine, and the writers were on others."""
    made = VectorDataset(str(tmp_path))
    markers = [made.put(number, clustered(ROWS, 32, number)) for number in range(2)]
    objects = [
        CorpusObject(n, f"s3://b/{n}.jsonl", 9, "e", Coding("jsonl", ""), (Span(0, 9, 0, (ROWS,)),))
        for n in range(2)
    ]
    plan, finished = Plan(tuple(objects), 2), {marker.unit.name: marker for marker in markers}
    work = EmbedWork(Settings(), Planned(made.dataset, made.spec, plan, 1, finished, (), Removal()))
    shard = tmp_path / markers[1].embeddings.path
    whole = shard.read_bytes()
    for spoil in (shard.unlink, lambda: shard.write_bytes(whole[:-1])):
        spoil()
        with pytest.raises(IncompleteRunError, match=r"1 files .* not at .*embeddings/00000001.*bucket"):
            work.publish(RunFacts("embed"))
        assert made.dataset.read_manifest() is None
    shard.write_bytes(whole)
    work.publish(RunFacts("embed"))
    published = made.dataset.read_manifest()
    assert published is not None
    assert published.rows_in == 2 * ROWS
