"""Groups of texts to the tensors of a step, by the tokenizers that embed and rerank by."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from bge_ray.model.feed.pairs import PairFeeder
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.spec import family_of
from bge_ray.model.train.examples import Group, Schedule, draw
from bge_ray.records.ids import IdArray
from bge_ray.records.model import ModelSpec
from bge_ray.records.tokens import PackedTokens

# Orders of epochs kept: a batch has examples of one.
KEPT_ORDERS = 2


@dataclass
class Collator:
    """Positions of a schedule to the tensors of a batch; `sentence_transformers` calls it so.

    ``tokenise`` returns the named rows of tokens of groups. A teacher's scores are handed on as ``label``
    where ``with_scores`` says so.
    """

    table: pa.Table
    schedule: Schedule
    size: int
    tokenise: Callable[[Sequence[Group]], dict[str, PackedTokens]]
    pad_id: int
    with_scores: bool
    valid_label_columns: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._order = functools.lru_cache(KEPT_ORDERS)(self.schedule.order)

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
        """Return the features of each part of a batch, their names behind that of the part."""
        groups = [self._group(row["position"]) for row in rows]
        batch: dict[str, torch.Tensor] = {}
        for name, tokens in self.tokenise(groups).items():
            for feature, tensor in padded(tokens, self.pad_id).items():
                batch[f"{name}_{feature}"] = tensor
        if self.with_scores:
            batch["label"] = torch.tensor([group.scores for group in groups], dtype=torch.float32)
        return batch

    def _group(self, position: int) -> Group:
        epoch, place = self.schedule.epoch_of(position)
        order: IdArray = self._order(epoch)
        return draw(self.table, int(order[place]), epoch, self.size, self.schedule.seed)


class TextTokens:
    """Queries and passages of an embedder, as it embeds them; a row's own prompt replaces the instruction."""

    def __init__(self, spec: ModelSpec, folder: Path, lengths: tuple[int, int], *, trusted: bool) -> None:
        """Load the tokenizer, which keeps so many tokens of a query and of a passage."""
        self._spec, self._folder, self._trusted = spec, folder, trusted
        self._query_length, passage_length = lengths
        self._passages = self._feeder(dataclasses.replace(spec, max_length=passage_length))
        self._feeder_of = functools.lru_cache(64)(self._of_prompt)

    def _feeder(self, spec: ModelSpec) -> TextFeeder:
        feeder = family_of(spec).feeder(spec, self._folder, trust_remote_code=self._trusted)
        if not isinstance(feeder, TextFeeder):
            raise TypeError(f"{spec.name}: is no embedder")
        return feeder

    def _of_prompt(self, prompt: str | None) -> TextFeeder:
        spec = dataclasses.replace(self._spec, max_length=self._query_length)
        return self._feeder(spec if prompt is None else dataclasses.replace(spec, query_instruction=prompt))

    def __call__(self, groups: Sequence[Group]) -> dict[str, PackedTokens]:
        """Return the tokens of n queries and of their passages, group by group."""
        passages = self._passages.passages([text for group in groups for text in group.passages])
        return {"query": self.queries(groups), "passage": passages}

    def queries(self, groups: Sequence[Group]) -> PackedTokens:
        """Return the tokens of n queries."""
        places: list[int] = []
        parts = []
        for prompt in dict.fromkeys(group.prompt for group in groups):
            mine = [place for place, group in enumerate(groups) if group.prompt == prompt]
            parts.append(self._feeder_of(prompt).queries([groups[place].query for place in mine]))
            places += mine
        return PackedTokens.concatenate(parts).take(np.argsort(places))


@dataclass(frozen=True)
class PairTokens:
    """Pairs of a reranker; a row's own prompt says nothing to it."""

    feeder: PairFeeder

    def __call__(self, groups: Sequence[Group]) -> dict[str, PackedTokens]:
        """Return the tokens of each query with each of its passages, group by group."""
        queries = [group.query for group in groups for _ in group.passages]
        return {"pair": self.feeder.pairs(queries, [text for group in groups for text in group.passages])}


def padded(tokens: PackedTokens, pad_id: int) -> dict[str, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask`` of n rows, (n, longest) int64, padded on the right.

    With segments also ``token_type_ids``.
    """
    lengths = tokens.lengths
    places = np.arange(int(lengths.max()))[None, :]
    there = places < lengths[:, None]
    ids = np.full(there.shape, pad_id, np.int64)
    ids[there] = tokens.input_ids
    features = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(there.astype(np.int64)),
    }
    if tokens.type_starts is not None:
        types = (places >= tokens.type_starts[:, None]) & there
        features["token_type_ids"] = torch.from_numpy(types.astype(np.int64))
    return features
