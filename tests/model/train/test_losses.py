"""Losses beside FlagEmbedding's own, of whole models with random weights and without dropout."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from bge_ray.model.train import pieces
from bge_ray.model.train.base import resolve_base
from bge_ray.model.train.build import build_model
from bge_ray.model.train.losses import Contrast
from bge_ray.model.train.objective import Embedding, Objective, Reranking, Unified
from bge_ray.settings.sections import Settings, parse_settings
from tests.support.models import SENTENCES, make_cross_encoder, make_encoder, make_m3

pytestmark = pytest.mark.parity

QUERIES = SENTENCES[:4]
GROUP = 3
PASSAGES = [f"{SENTENCES[(i + j) % 8]} {SENTENCES[j]}" for i in range(4) for j in range(GROUP)]
TEACHER = torch.tensor([[2.0, 0.5, -1.0], [1.0, 1.5, 0.0], [0.3, 0.2, 0.1], [4.0, -2.0, 1.0]])
TOLERANCE = 1e-6


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def built(*words: str) -> Any:
    settings: Settings = parse_settings(None, words)
    base = resolve_base(settings)
    return without_dropout(build_model(base, Path(base.spec.name), settings.train))


def tokens(folder: Path, *texts: Sequence[str]) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(*map(list, texts), padding=True, return_tensors="pt"))


def ours(objective: Objective, batches: list[dict[str, torch.Tensor]], teacher: Any) -> float:
    """In float64, as theirs: over 0.02, float32 rounds a cosine by 3e-6, each processor otherwise."""
    return objective.double()([dict(batch) for batch in batches], teacher).item()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("losses") / "encoder", pooling="mean")


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_m3(tmp_path_factory.mktemp("losses") / "m3")


@pytest.mark.parametrize("negatives", ["own", "worker", "all"])
@pytest.mark.parametrize("distill", ["none", "kl", "m3_kd"])
@pytest.mark.parametrize("dims", [(), (8, 16, 32)])
def test_of_embeddings(encoder: Path, negatives: Any, distill: Any, dims: tuple[int, ...]) -> None:
    from FlagEmbedding.finetune.embedder.encoder_only.base.modeling import BiEncoderOnlyEmbedderModel

    if negatives == "own" and distill == "m3_kd":
        pytest.skip("settings refuse it")
    theirs = (
        BiEncoderOnlyEmbedderModel(
            without_dropout(AutoModel.from_pretrained(encoder)),
            temperature=0.02,
            kd_loss_type={"m3_kd": "m3_kd_loss"}.get(distill, "kl_div"),
            use_mrl=bool(dims),
            mrl_dims=list(dims),
            sentence_pooling_method="mean",
            normalize_embeddings=True,
        )
        .double()
        .train()
    )
    batches = [tokens(encoder, QUERIES), tokens(encoder, PASSAGES)]
    teacher = TEACHER if distill != "none" else None
    wanted = theirs(
        queries=batches[0],
        passages=batches[1],
        teacher_scores=None if teacher is None else teacher.flatten().tolist(),
        no_in_batch_neg_flag=negatives == "own",
    ).loss.item()
    objective = Embedding(built(f"model.name={encoder}"), Contrast(0.02, negatives, distill, dims))
    assert ours(objective, batches, teacher) == pytest.approx(wanted, abs=TOLERANCE, rel=TOLERANCE)


@pytest.mark.parametrize("distill", ["none", "kl", "m3_kd"])
@pytest.mark.parametrize("self_distill", [False, True])
def test_of_all_three_outputs_of_m3(m3: Path, distill: Any, self_distill: bool) -> None:
    from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model

    from bge_ray.model.run.load import load_linear

    heads = {
        name: load_linear(m3 / f"{name}.safetensors", torch.float32)
        for name in ("sparse_linear", "colbert_linear")
    }
    theirs = (
        EncoderOnlyEmbedderM3Model(
            {"model": without_dropout(AutoModel.from_pretrained(m3)), **heads},
            tokenizer=AutoTokenizer.from_pretrained(m3),
            temperature=0.02,
            kd_loss_type={"m3_kd": "m3_kd_loss"}.get(distill, "kl_div"),
            sentence_pooling_method="cls",
            normalize_embeddings=True,
            unified_finetuning=True,
            use_self_distill=self_distill,
            self_distill_start_step=0,
        )
        .double()
        .train()
    )
    batches = [tokens(m3, QUERIES), tokens(m3, PASSAGES)]
    teacher = TEACHER if distill != "none" else None
    given = None if teacher is None else teacher.flatten().tolist()
    model = built(f"model.name={m3}", "model.outputs=[embedding,sparse,colbert]", "train.unified=true")
    objective = Unified(model, Contrast(0.02, "all", distill), 0 if self_distill else None)
    for step in range(2):  # the outputs learn from their sum after step 0
        wanted = theirs(queries=batches[0], passages=batches[1], teacher_scores=given).loss.item()
        objective.step = step
        assert ours(objective, batches, teacher) == pytest.approx(wanted, abs=TOLERANCE, rel=TOLERANCE)


@pytest.mark.parametrize("teacher", [None, TEACHER])
def test_of_a_reranker(tmp_path: Path, teacher: torch.Tensor | None) -> None:
    from FlagEmbedding.finetune.reranker.encoder_only.base.modeling import CrossEncoderModel

    folder = make_cross_encoder(tmp_path / "reranker")
    base = without_dropout(AutoModelForSequenceClassification.from_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = CrossEncoderModel(base, tokenizer, train_batch_size=len(QUERIES)).double().train()
    pairs = tokens(folder, [q for q in QUERIES for _ in range(GROUP)], PASSAGES)
    wanted = theirs(pair=pairs, teacher_scores=None if teacher is None else teacher.tolist()).loss.item()
    model = built("train.kind=reranker", f"rerank.model={folder}")
    assert ours(Reranking(model, GROUP), [pairs], teacher) == pytest.approx(
        wanted, abs=TOLERANCE, rel=TOLERANCE
    )


def gradients(
    objective: Objective, batches: list[dict[str, torch.Tensor]], teacher: Any
) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    torch.manual_seed(0)
    objective([dict(batch) for batch in batches], teacher).backward()
    return {name: part.grad.clone() for name, part in objective.named_parameters() if part.grad is not None}


def of_embedder(encoder: Path, m3: Path, rows: int | None) -> tuple[Objective, Path]:
    return Embedding(built(f"model.name={encoder}"), Contrast(0.02, "all", "kl", (8, 32)), rows), encoder


def of_m3(encoder: Path, m3: Path, rows: int | None) -> tuple[Objective, Path]:
    model = built(f"model.name={m3}", "model.outputs=[embedding,sparse,colbert]", "train.unified=true")
    return Unified(model, Contrast(0.02, "all", "kl"), None, rows), m3


@pytest.mark.parametrize("make", [of_embedder, of_m3])
@pytest.mark.parametrize("rows", [1, 5, 7])
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(
    encoder: Path, m3: Path, make: Callable[..., tuple[Objective, Path]], rows: int
) -> None:
    whole, folder = make(encoder, m3, None)
    batches = [tokens(folder, QUERIES), tokens(folder, PASSAGES)]
    cached, _ = make(encoder, m3, rows)
    truth = gradients(whole, batches, TEACHER)
    found = gradients(cached, batches, TEACHER)
    assert truth.keys() == found.keys()
    for name, gradient in truth.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("rows", [9, 10, 40])
@pytest.mark.parametrize("kind", ["encoder", "reranker"])
def test_rows_of_like_length_together_have_the_loss_and_the_gradient_of_all(
    tmp_path: Path, encoder: Path, kind: str, rows: int
) -> None:
    texts = [" ".join(SENTENCES[i % 8] for i in range(n % 5 + 1)) for n in range(rows)]
    if kind == "encoder":
        objective: Objective = Embedding(built(f"model.name={encoder}"), Contrast(0.02, "worker"))
        batches, teacher = [tokens(encoder, texts), tokens(encoder, texts[::-1])], None
    else:
        folder = make_cross_encoder(tmp_path / "reranker")
        objective = Reranking(built(f"rerank.model={folder}", "train.kind=reranker"), rows)
        batches, teacher = [tokens(folder, [SENTENCES[0]] * rows, texts)], None
    counted = []
    objective.model.register_forward_pre_hook(
        lambda _, given: counted.append(given[0]["input_ids"].numel()) and None
    )
    loss, found = objective([dict(part) for part in batches]).item(), gradients(objective, batches, teacher)
    computed = sum(counted) / 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "MOST", 1)
        assert objective([dict(part) for part in batches]).item() == pytest.approx(loss, abs=2e-5)
        truth = gradients(objective, batches, teacher)
    for name, gradient in truth.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    padded = sum(part["input_ids"].numel() for part in batches)
    assert computed == padded if rows < 10 else computed < 0.9 * padded


def test_pieces_drop_out_the_same_in_both_passes(encoder: Path) -> None:
    """Dropout in the second pass as in the first: the gradient of the loss that was told, by differences."""
    settings = parse_settings(None, [f"model.name={encoder}"])
    model = build_model(resolve_base(settings), encoder, settings.train)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    model.double().train()
    objective = Embedding(model, Contrast(1.0, "all"), 3)
    batches = [tokens(encoder, QUERIES), tokens(encoder, PASSAGES)]
    name, weight = next((n, p) for n, p in objective.named_parameters() if "query.weight" in n)
    slope = gradients(objective, batches, None)[name].double()
    step = slope / slope.norm()

    def loss_at(distance: float) -> float:
        with torch.no_grad():
            weight.add_(step, alpha=distance)
        torch.manual_seed(0)
        loss = objective([dict(batch) for batch in batches]).item()
        with torch.no_grad():
            weight.sub_(step, alpha=distance)
        return loss

    by_difference = (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3
    assert by_difference == pytest.approx(float(slope.norm()), rel=1e-2)
