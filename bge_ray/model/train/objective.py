"""What a step minimises: the features of a batch through the model to a loss, at once or piece by piece."""

from collections.abc import Sequence
from typing import Any

import torch

from bge_ray.model.train.cached import Features, cached_loss
from bge_ray.model.train.losses import (
    Contrast,
    TokenVectors,
    embedding_loss,
    reranking_loss,
    unified_loss,
    unit,
)
from bge_ray.model.train.pieces import by_length


class Objective(torch.nn.Module):
    """The loss that `sentence_transformers` is given; it replaces ``model`` by what it wraps it in."""

    def __init__(self, model: torch.nn.Module, cached_rows: int | None) -> None:
        """Take a model of sentence-transformers, and the rows of a piece; None: all at once."""
        super().__init__()
        self.model = model
        self._cached_rows = cached_rows

    def forward(self, features: list[Features], teacher: torch.Tensor | None = None) -> torch.Tensor:
        """Return the loss of a batch."""
        rows = self._cached_rows

        def loss_of(made: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
            return self.loss(features, made, teacher)

        if rows is None or not torch.is_grad_enabled() or all(len(f["input_ids"]) <= rows for f in features):
            return loss_of([self._made(part) for part in features])
        return cached_loss(features, rows, self.represent, loss_of, self.model)

    def represent(self, features: Features) -> tuple[torch.Tensor, ...]:
        """Return what the model makes of rows."""
        raise NotImplementedError

    def _made(self, features: Features) -> tuple[torch.Tensor, ...]:
        """Return what the model makes of a whole batch; rows of like length are padded together."""
        return by_length(features, self.represent)

    def loss(
        self, features: list[Features], made: Sequence[tuple[torch.Tensor, ...]], teacher: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the loss of what was made of each part of a batch."""
        raise NotImplementedError


def _single(made: torch.Tensor) -> torch.Tensor:
    """Return what a model made in float32, or in float64 if that is what it computes in."""
    return made.to(torch.promote_types(made.dtype, torch.float32))


class Embedding(Objective):
    """Of an embedder: queries and passages."""

    def __init__(self, model: torch.nn.Module, how: Contrast, cached_rows: int | None = None) -> None:
        super().__init__(model, cached_rows)
        self._how = how

    def represent(self, features: Features) -> tuple[torch.Tensor, ...]:
        """Return (n, dim) embeddings."""
        return (_single(self.model(features)["sentence_embedding"]),)

    def loss(
        self,
        features: list[Features],  # noqa: ARG002 - the embeddings say all
        made: Sequence[tuple[torch.Tensor, ...]],
        teacher: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the loss of the embeddings."""
        (queries,), (passages,) = made
        return embedding_loss(queries, passages, self._how, teacher)


class Unified(Objective):
    """Of bge-m3 with its three outputs; ``step`` counts the batches so far."""

    def __init__(
        self,
        model: torch.nn.Module,
        how: Contrast,
        self_distill_after: int | None = None,
        cached_rows: int | None = None,
    ) -> None:
        super().__init__(model, cached_rows)
        self._how, self._after, self.step = how, self_distill_after, 0

    def _made(self, features: Features) -> tuple[torch.Tensor, ...]:
        """All at once: the loss is of what was made of each token, at its place in the batch."""
        return self.represent(dict(features))

    def represent(self, features: Features) -> tuple[torch.Tensor, ...]:
        """Return embeddings, weights of tokens and vectors of tokens."""
        made = self.model(features)
        return (
            _single(made["sentence_embedding"]),
            _single(made["token_weights"]),
            _single(made["token_vectors"]),
        )

    def loss(
        self, features: list[Features], made: Sequence[tuple[torch.Tensor, ...]], teacher: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the loss of the three outputs, each step with the next number."""
        queries, passages = (
            TokenVectors(unit(dense), weights, vectors, part["input_ids"], part["attention_mask"])
            for part, (dense, weights, vectors) in zip(features, made, strict=True)
        )
        learns = self._after is not None and self.step > self._after
        return unified_loss(queries, passages, self._how, teacher, self_distill=learns)


class Reranking(Objective):
    """Of a reranker: pairs, the groups one after the other."""

    def __init__(self, model: torch.nn.Module, group: int, cached_rows: int | None = None) -> None:
        super().__init__(model, cached_rows)
        self._group = group

    def represent(self, features: Features) -> tuple[torch.Tensor, ...]:
        """Return (n, 1) logits."""
        return (_single(self.model(features)["scores"]),)

    def loss(
        self,
        features: list[Features],  # noqa: ARG002 - the logits say all
        made: Sequence[tuple[torch.Tensor, ...]],
        teacher: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the loss of the logits."""
        ((logits,),) = made
        return reranking_loss(logits.view(-1, self._group), teacher)


class TokenHeads(torch.nn.Module):
    """The sparse and the ColBERT head of bge-m3 as a module of sentence-transformers."""

    def __init__(
        self, sparse: torch.nn.Linear, colbert: torch.nn.Linear, without_weight: Sequence[int]
    ) -> None:
        """Take the heads, and the tokens that stand for no part of a text."""
        super().__init__()
        self.sparse, self.colbert = sparse, colbert
        self._special = tuple(without_weight)

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add ``token_weights`` (n, t) and ``token_vectors`` (n, t - 1, dim) of unit norm."""
        states, mask = features["token_embeddings"], features["attention_mask"]
        weights = torch.relu(self.sparse(states)).squeeze(-1)
        special = torch.tensor(self._special, device=states.device)
        features["token_weights"] = weights * ~torch.isin(features["input_ids"], special)
        features["token_vectors"] = unit(_single(self.colbert(states[:, 1:])) * mask[:, 1:, None])
        return features
