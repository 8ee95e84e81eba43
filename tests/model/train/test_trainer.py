"""Trainings of tiny models in this process: resumed, saved, and read back by everybody."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bge_ray.errors import ModelError
from bge_ray.formats.training import read_examples
from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import family_of
from bge_ray.model.train.base import resolve_base
from bge_ray.model.train.build import TRAINED, build_model, refuse_incomplete, save_model, save_trained
from bge_ray.model.train.trainer import Hooks, Setup, make_trainer
from bge_ray.pipeline.train.loop import resumable
from bge_ray.pipeline.train.plan import make_schedule
from bge_ray.pipeline.train.run import read_back, to_table
from bge_ray.settings.sections import Settings
from bge_ray.storage.objects import Storage
from tests.support.models import make_cross_encoder, make_decoder, make_encoder, make_m3
from tests.support.slow import slow_but
from tests.support.training import as_settings, training_keys

pytestmark = pytest.mark.long

pytest.importorskip("sentence_transformers")

KINDS: dict[str, tuple[Any, dict[str, object]]] = {
    "dense": (make_encoder, {"group": 1}),
    "kl": (make_encoder, {"distill": "kl", "model.query_instruction": "find: "}),
    "pieces": (make_encoder, {"cached_rows": 5, "dims": [8, 32], "dtype": "bfloat16"}),
    "lora": (lambda folder: make_decoder(folder, "qwen2"), {"lora_rank": 4, "model.pooling": "last_token"}),
    "m3": (make_m3, {"unified": True, "distill": "kl", "self_distill_after": 1}),
    "reranker": (make_cross_encoder, {"kind": "reranker", "distill": "kl", "cached_rows": 7}),
    "new head": (make_encoder, {"kind": "reranker"}),
    "lora reranker": (make_cross_encoder, {"kind": "reranker", "lora_rank": 2}),
}


def run(
    settings: Settings, work: Path, resume: Path | None = None
) -> tuple[Any, list[float], dict[int, Path]]:
    """Train; return the trainer, the losses by step, and a copy of each checkpoint."""
    base = resolve_base(settings)
    folder = Path(base.spec.name)
    examples = list(read_examples(Storage(), str(settings.train.data), lambda *_: None))
    losses: list[float] = []
    kept: dict[int, Path] = {}

    def keep(step: int, path: Path) -> None:
        resumable(path)
        kept[step] = shutil.copytree(path, work / "kept" / path.name)

    hooks = Hooks(lambda _, logs: losses.append(logs["loss"]), keep)
    model = build_model(base, folder, settings.train)
    schedule = make_schedule(settings.train, len(examples))
    table = to_table(examples)
    trainer = make_trainer(model, table, Setup(base, folder, settings.train, schedule, work), hooks)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, losses, kept


@pytest.mark.parametrize("kind", slow_but(["dense", "reranker"], KINDS))
def test_a_resumed_training_is_the_same_to_the_bit_and_is_read_back(tmp_path: Path, kind: str) -> None:
    make, keys = KINDS[kind]
    source = make(tmp_path / "model")
    settings = as_settings(training_keys(tmp_path, source, tmp_path / "out", **keys))
    trainer, losses, kept = run(settings, tmp_path / "one")
    assert len(losses) == 4
    assert all(np.isfinite(losses))
    assert {path.name for path in kept[2].iterdir()} == {
        TRAINED,
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
    }
    _, rest, again = run(settings, tmp_path / "two", kept[2])
    assert rest == losses[2:]
    truth, found = load_file(kept[4] / TRAINED), load_file(again[4] / TRAINED)
    assert truth.keys() == found.keys()
    assert all(torch.equal(truth[name], found[name]) for name in truth)
    begun = load_file(kept[2] / TRAINED)
    assert any(not torch.equal(truth[name], begun[name]) for name in truth)
    if "lora" in kind:
        assert all("lora_" in name or "classifier" in name or "pooler" in name for name in truth)
    base = resolve_base(settings)
    trained = tmp_path / "trained"
    with torch.no_grad():
        wanted = outputs(trainer, settings)
    save_model(trainer.model, base, settings.train, trained)
    spec = read_back(settings, base, trained)
    model = Model(spec, trained, Place())
    feeder = family_of(spec).feeder(spec, trained, trust_remote_code=False)
    texts, passages = ["a corpus in object storage", "faiss"], ["ray runs actors", "the quick brown fox"]
    tokens: Any = (
        feeder.pairs(texts, passages) if settings.train.kind == "reranker" else feeder.queries(texts)
    )  # type: ignore[union-attr]
    result = model.empty_result(len(tokens))
    model.run(tokens, model.cut(tokens, 512), result)
    # What it makes in bfloat16 has two digits.
    tolerance = 2e-2 if settings.train.dtype == "bfloat16" else 2e-5
    np.testing.assert_allclose(result.array(spec.outputs[0].name), wanted, atol=tolerance)
    theirs = in_sentence_transformers(trained, settings, texts, passages)
    np.testing.assert_allclose(theirs, wanted, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_files_lack_is_refused_and_not_drawn_at_random(tmp_path: Path, kind: str) -> None:
    make, keys = KINDS[kind]
    source = make(tmp_path / "model")
    settings = as_settings(training_keys(tmp_path, source, tmp_path / "out", **keys))
    refuse_incomplete(resolve_base(settings), source)
    tensors = load_file(source / "model.safetensors")
    lost = next(name for name in tensors if re.search(r"layers?\.1\..*weight", name))
    save_file({name: part for name, part in tensors.items() if name != lost}, source / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 weights are not in .* random, such as .*\.1\."):
        refuse_incomplete(resolve_base(settings), source)


@pytest.mark.parametrize("kind", ["dense", "reranker"])
def test_a_training_that_left_the_numbers_ends_and_keeps_nothing_of_it(tmp_path: Path, kind: str) -> None:
    make, keys = KINDS[kind]
    keys = keys | {"learning_rate": 1e30, "warmup": 0.0}
    source = make(tmp_path / "model")
    settings = as_settings(training_keys(tmp_path, source, tmp_path / "out", **keys))
    with pytest.raises(ModelError, match=r"step [23]: the loss is (nan|inf).*train.learning_rate"):
        run(settings, tmp_path / "one")
    # A checkpoint behind a step, whose loss was a number, that made weights which are none.
    model = build_model(resolve_base(settings), source, settings.train)
    part = next(part for part in model.parameters() if part.requires_grad)
    with torch.no_grad():
        part.view(-1)[3] = float("nan")
    with pytest.raises(ModelError, match=r"no finite numbers any more; lower train.learning_rate"):
        save_trained(model, tmp_path / "checkpoint")
    with pytest.raises(ModelError, match="no finite numbers"):
        save_model(model, resolve_base(settings), settings.train, tmp_path / "made")
    assert not (tmp_path / "checkpoint").exists()
    assert not (tmp_path / "made").exists()


def outputs(trainer: Any, settings: Settings) -> np.ndarray:
    """Return what the model makes of two texts, or pairs, right behind its training."""
    from bge_ray.model.train.batches import padded

    base = resolve_base(settings)
    folder = Path(base.spec.name)
    feeder: Any = family_of(base.spec).feeder(base.spec, folder, trust_remote_code=False)
    texts, passages = ["a corpus in object storage", "faiss"], ["ray runs actors", "the quick brown fox"]
    pairs = settings.train.kind == "reranker"
    tokens = feeder.pairs(texts, passages) if pairs else feeder.queries(texts)
    trainer.model.eval()
    made = trainer.model(padded(tokens, feeder._cutter._backend.token_to_id("[PAD]") or 1))
    return made["scores"].float().numpy()[:, 0] if pairs else made["sentence_embedding"].float().numpy()


def in_sentence_transformers(
    folder: Path, settings: Settings, texts: list[str], passages: list[str]
) -> np.ndarray:
    from sentence_transformers import CrossEncoder, SentenceTransformer

    if settings.train.kind == "reranker":
        model = CrossEncoder(
            str(folder), device="cpu", activation_fn=torch.nn.Identity(), local_files_only=True
        )
        return np.asarray(model.predict(list(zip(texts, passages, strict=True))))
    return np.asarray(
        SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode_query(texts)
    )
