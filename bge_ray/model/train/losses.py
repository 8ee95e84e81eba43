"""The losses of a training as FlagEmbedding has them, with the gradient of the whole step over all workers.

Each is a mean over this worker's queries, so that the mean over workers, which DDP takes of gradients, is
the loss of the step. A passage of the i-th query stands in row i * group + j, its positive in j = 0.
Source: FlagEmbedding 1.4.2, abc/finetune/embedder/AbsModeling.py and
finetune/embedder/encoder_only/m3/modeling.py.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch.nn import functional

from bge_ray.model.train.gather import first_row, gathered

Negatives: TypeAlias = Literal["own", "worker", "all"]
Distill: TypeAlias = Literal["none", "kl", "m3_kd"]

# How much the sparse score counts in the sum of the three, and its loss among theirs.
SPARSE_SHARE, SPARSE_WEIGHT = 0.3, 0.1


@dataclass(frozen=True)
class Contrast:
    """What a query is compared with, by which a cosine is divided, and how a teacher is followed."""

    temperature: float = 0.02
    negatives: Negatives = "all"
    distill: Distill = "none"
    dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenVectors:
    """What m3 makes of n texts, of the tokens ``ids`` (n, t), of which there are those of ``mask`` (n, t).

    ``dense`` is (n, dim) of unit norm, ``weights`` (n, t), ``vectors`` (n, t - 1, dim) of unit norm for all
    but the first token, zero where there is none.
    """

    dense: torch.Tensor
    weights: torch.Tensor
    vectors: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor


def embedding_loss(
    queries: torch.Tensor, passages: torch.Tensor, how: Contrast, teacher: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the loss of embeddings.

    Args:
        queries: (n, dim), of any length.
        passages: (n * group, dim).
        how: temperature, what is compared, and by which ``dims`` (each may be more than dim).
        teacher: (n, group) scores of a teacher; None without one.
    """
    targets = None if teacher is None else torch.softmax(teacher, dim=-1)
    parts = []
    for dim in how.dims or (queries.shape[-1],):
        one, two = (functional.normalize(part[:, :dim], dim=-1) for part in (queries, passages))
        parts.append(_dense_loss(one, two, how, targets))
    return torch.stack(parts).mean()


def _dense_loss(
    queries: torch.Tensor, passages: torch.Tensor, how: Contrast, targets: torch.Tensor | None
) -> torch.Tensor:
    n, group = len(queries), len(passages) // len(queries)
    if how.negatives == "own":
        own = torch.einsum("nd,ngd->ng", queries, passages.view(n, group, -1)) / how.temperature
        return _of_scores(own, own, torch.zeros(n, dtype=torch.long, device=own.device), how.distill, targets)
    before = 0
    if how.negatives == "all":
        before, passages = first_row(n) * group, gathered(passages)
    scores = queries @ passages.T / how.temperature
    first = before + torch.arange(n, device=scores.device) * group
    return _of_scores(scores, own_scores(scores, first, group), first, how.distill, targets)


def own_scores(scores: torch.Tensor, first: torch.Tensor, group: int) -> torch.Tensor:
    """Return (n, group) scores of each query's own passages, out of (n, all); the own begin at ``first``."""
    return scores.gather(1, first[:, None] + torch.arange(group, device=scores.device))


def _of_scores(
    scores: torch.Tensor,
    own: torch.Tensor,
    first: torch.Tensor,
    distill: Distill,
    targets: torch.Tensor | None,
) -> torch.Tensor:
    if targets is None or distill == "none":
        return functional.cross_entropy(scores, first)
    if distill == "kl":
        return functional.cross_entropy(scores, first) + distillation(own, targets)
    return _one_by_one(scores, first, targets)


def distillation(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of scores (n, m) to the targets (n, m), which sum to 1 a row."""
    return -(torch.log_softmax(scores, dim=-1) * targets).sum(dim=-1).mean()


def _one_by_one(scores: torch.Tensor, first: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum over a group of cross-entropies, each weighted by its target, earlier ones left out."""
    total = scores.new_zeros(())
    left_out = torch.zeros_like(scores)
    for place in range(targets.shape[1]):
        column = first + place
        loss = functional.cross_entropy(scores + left_out, column, reduction="none")
        total = total + (targets[:, place] * loss).mean()
        left_out = left_out.scatter(1, column[:, None], torch.finfo(scores.dtype).min)
    return total


def unified_loss(
    queries: TokenVectors,
    passages: TokenVectors,
    how: Contrast,
    teacher: torch.Tensor | None = None,
    *,
    self_distill: bool = False,
) -> torch.Tensor:
    """Return the loss of bge-m3's three outputs together.

    Sparse and ColBERT scores are compared within the worker, whatever ``how`` says of the dense ones.

    Args:
        queries: of n queries.
        passages: of n * group passages.
        how: temperature, what dense scores are compared with, and the way of the teacher.
        teacher: (n, group) scores of a teacher; None without one.
        self_distill: let each output learn from the sum of the three.
    """
    n, group = len(queries.dense), len(passages.dense) // len(queries.dense)
    targets = None if teacher is None else torch.softmax(teacher, dim=-1)
    first = torch.arange(n, device=queries.dense.device) * group
    dense = queries.dense @ passages.dense.T / how.temperature
    sparse = sparse_scores(queries, passages) / how.temperature
    colbert = colbert_scores(queries, passages) / how.temperature
    ensemble = dense + SPARSE_SHARE * sparse + colbert

    def loss_of(scores: torch.Tensor) -> torch.Tensor:
        return _of_scores(scores, own_scores(scores, first, group), first, how.distill, targets)

    loss = (
        _dense_loss(queries.dense, passages.dense, how, targets)
        + loss_of(ensemble)
        + SPARSE_WEIGHT * loss_of(sparse)
        + loss_of(colbert)
    ) / 4
    if not self_distill:
        return loss
    taught = torch.softmax(ensemble.detach(), dim=-1)
    parts = distillation(dense, taught) + SPARSE_WEIGHT * distillation(sparse, taught)
    return (loss + (parts + distillation(colbert, taught)) / 3) / 2


def sparse_scores(queries: TokenVectors, passages: TokenVectors) -> torch.Tensor:
    """Return (n, m) sums over the tokens in common of the products of their greatest weights."""
    tokens = torch.unique(torch.cat([queries.ids.flatten(), passages.ids.flatten()]))
    one, two = (
        torch.zeros(
            len(part.ids), len(tokens), dtype=part.weights.dtype, device=part.ids.device
        ).scatter_reduce(1, torch.searchsorted(tokens, part.ids), part.weights, "amax")
        for part in (queries, passages)
    )
    return one @ two.T


def colbert_scores(queries: TokenVectors, passages: TokenVectors) -> torch.Tensor:
    """Return (n, m) means over a query's tokens of the greatest cosine with a token of the passage.

    A token that is not there has cosine 0 with all, as in FlagEmbedding.
    """
    cosines = torch.einsum("qin,pjn->qipj", queries.vectors, passages.vectors)
    lengths = queries.mask[:, 1:].sum(-1, keepdim=True)
    return cosines.amax(-1).sum(1) / lengths


def reranking_loss(logits: torch.Tensor, teacher: torch.Tensor | None = None) -> torch.Tensor:
    """Return the loss of a reranker: cross-entropy of each group's first, and that to a teacher.

    Args:
        logits: (n, group).
        teacher: (n, group) scores of a teacher; None without one.
    """
    loss = functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
    return loss if teacher is None else loss + distillation(logits, torch.softmax(teacher, dim=-1))


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Return vectors of unit norm along the last dimension; zero stays zero."""
    return functional.normalize(vectors, dim=-1)
