"""The reranker: packed (query, passage) pairs in, one raw logit a pair out; knows no runs and no Ray."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bge_ray.model.feed.rows import Rows
from bge_ray.model.reranker_spec import RerankerSpec
from bge_ray.model.run.batching import longest_rows, token_budget_batches
from bge_ray.model.run.executor import Computed
from bge_ray.model.run.inputs import Inputs, pool
from bge_ray.model.run.load import Kind
from bge_ray.model.run.prepare import prepare_executor
from bge_ray.records.ids import FloatArray, IdArray

KIND: Kind = "cross_encoder"
# The head of a cross-encoder looks at the first token alone.
POOLING = "cls"


class Scored(Computed):
    """Scores of n pairs, and why some have none."""

    @property
    def scores(self) -> FloatArray:
        """(n,) float32 raw logits; zero for a pair named in ``faults``."""
        return self.values[:, 0]


class Reranker:
    """One cross-encoder on one device. ``score`` is the only verb."""

    def __init__(
        self,
        spec: RerankerSpec,
        *,
        device: str,
        threads: int = 1,
        trust_remote_code: bool = False,
        packed: bool | None = None,
    ) -> None:
        """Load the model that ``spec`` names, and refuse any other.

        Args:
            spec: the reranker as the run was planned with it.
            device: a torch device, such as cpu or cuda.
            threads: CPU threads of this process's forward passes.
            trust_remote_code: run Python code found in the model folder.
            packed: run without padding; None where it is known to be right and faster.

        Raises:
            ModelError: the weights here are not those of the spec, or the classifier's are missing.
        """
        torch.set_num_threads(threads)
        self.spec = spec
        self._executor = prepare_executor(
            spec.name,
            spec.revision,
            spec.weights_sha256,
            KIND,
            POOLING,
            _compute,
            dtype=spec.dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            packed=packed,
        )
        self.device = self._executor.device

    def cut(self, lengths: np.ndarray, budget: int) -> list[IdArray]:
        """Cut pairs of (n,) ``lengths`` into batches of at most ``budget`` tokens, as this model counts."""
        return token_budget_batches(lengths, budget, packed=self._executor.packed)

    def empty_result(self, n_pairs: int) -> Scored:
        """Return a result of n pairs that `score` fills."""
        return Scored(np.zeros((n_pairs, 1), dtype=np.float32))

    def warm_up(self, budget: int) -> None:
        """Score a batch of the longest pairs for nothing: kernels are loaded, and memory is claimed."""
        tokens = longest_rows(self.spec.max_length, budget)
        self.score(Rows(tokens), self.cut(tokens.lengths, budget), self.empty_result(len(tokens)))

    def score(self, pairs: Rows, batches: Sequence[IdArray], result: Scored) -> None:
        """Score the pairs of the given batches into ``result``.

        A batch that does not fit in memory is halved and tried again; a single pair that does not
        fit, or whose score is not finite even in float32, is named in ``faults``.

        Args:
            pairs: n pairs of one or many queries, as `PairTokenizer` makes them.
            batches: row numbers of each forward pass, as `cut` makes them.
            result: of `empty_result(n)`; pairs in no batch are left as they are.

        Raises:
            RuntimeError: whatever the model raises that is not a lack of memory.
        """
        self._executor.run(pairs, batches, result)


def _compute(model: Any, inputs: Inputs) -> torch.Tensor:
    """Return (pairs, 1) logits."""
    if inputs.borders is None:
        return torch.as_tensor(model(**inputs.arguments).logits)
    # The head takes the first token of each row, and a packed batch is one row: it gets them apart.
    hidden = model.base_model(**inputs.arguments).last_hidden_state
    first = pool(hidden, inputs, POOLING).to(hidden.dtype).unsqueeze(1)  # (pairs, 1, dim)
    pooled = model.bert.pooler(first) if model.config.model_type == "bert" else first
    return torch.as_tensor(model.classifier(pooled))
