"""Whole trainings on Ray Train with tiny models: published, found finished, and refused."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from bge_ray.errors import DatasetMismatchError
from bge_ray.pipeline.train.job import plan_train, train
from bge_ray.records.reports import TrainReport, read_report
from bge_ray.storage.objects import Storage
from tests.support.models import make_encoder
from tests.support.searches import query_vectors
from tests.support.training import as_settings, training_keys

pytestmark = pytest.mark.ray


def facts(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


@pytest.mark.usefixtures("ray_cluster")
def test_an_embedder_is_trained_published_and_found_finished(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = make_encoder(tmp_path / "model", pooling="mean")
    out = tmp_path / "out"
    keys = training_keys(
        tmp_path, model, out, workers=1, distill="kl", **{"model.query_instruction": "find: "}
    )
    report = train(as_settings(keys))
    assert report.complete
    assert (report.steps, report.examples, report.left_out, report.restarts) == (4, 48, 0, 0)
    assert [point.step for point in report.curve] == [1, 2, 3, 4]
    figures = report.figures
    assert figures is not None
    assert figures.before is not None
    assert figures.difference is not None
    assert figures.queries == 12
    assert figures.difference.mean == pytest.approx(figures.after.mean - figures.before.mean)
    assert figures.after.low <= figures.after.mean <= figures.after.high
    assert not (out / "work").exists()

    # As embed reads it, and as sentence-transformers does: the instruction came with the folder.
    texts = ["the quick brown fox", "faiss"]
    ours = query_vectors(out, texts)
    loaded = SentenceTransformer(str(out), device="cpu", local_files_only=True)
    np.testing.assert_allclose(loaded.encode_query(texts), ours, atol=1e-5)
    assert not np.allclose(ours, query_vectors(model, texts), atol=1e-2)

    _, head, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "model"
    for said in (
        report.data_sha256,
        report.model.weights_sha256,
        f"{figures.after.mean:.4f}",
        'train.distill | `"kl"`',
    ):
        assert said in text
    page = (out / "report.html").read_text()
    assert f"{figures.before.mean:.4f}" in page
    assert "aria-label='Loss'" in page
    assert read_report(TrainReport, (out / "report.json").read_bytes()) == report

    before = facts(out)
    assert train(as_settings(keys)).outcome == "nothing to do"
    assert plan_train(as_settings(keys)).endswith("up to date")
    with pytest.raises(DatasetMismatchError, match=r"train.seed was 0, now 1"):
        train(as_settings(keys | {"train.seed": 1}))
    assert facts(out) == before


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_a_reranker_out_of_an_encoder_in_object_storage(tmp_path: Path, bucket: str) -> None:
    from bge_ray.model.spec import resolve_reranker
    from bge_ray.settings.sections import RerankSettings

    model = make_encoder(tmp_path / "model")
    storage = Storage(20)
    for name in ("data", "held_out"):
        training_keys(tmp_path, model, bucket)
        storage.write(f"{bucket}/{name}.jsonl", (tmp_path / f"{name}.jsonl").read_bytes())
    keys = training_keys(tmp_path, model, f"{bucket}/out", kind="reranker", cached_rows=5)
    keys |= {"train.data": f"{bucket}/data.jsonl", "train.held_out": f"{bucket}/held_out.jsonl"}
    report = train(as_settings(keys))
    assert report.fresh_head
    assert report.figures is not None
    assert report.figures.before is None
    assert 0 < report.figures.after.mean <= 1
    spec = resolve_reranker(RerankSettings(model=f"{bucket}/out"), on_gpu=False)
    assert spec.family == "cross_encoder"
    assert storage.list_files(f"{bucket}/out/work") == []
    assert train(as_settings(keys)).outcome == "nothing to do"
