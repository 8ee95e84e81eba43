"""The encoder: packed token ids in, one vector a row out; knows no files, no corpus and no Ray."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name the field uses

from bge_ray.errors import ModelError
from bge_ray.model.feed.rows import Rows
from bge_ray.model.run.batching import longest_rows, token_budget_batches
from bge_ray.model.run.executor import Computed
from bge_ray.model.run.inputs import Inputs, pool
from bge_ray.model.run.load import Kind
from bge_ray.model.run.prepare import prepare_executor
from bge_ray.records.dataset import ModelSpec
from bge_ray.records.ids import FloatArray, IdArray
from bge_ray.records.tokens import PackedTokens

KIND: Kind = "encoder"


class Encoded(Computed):
    """Vectors of n rows, and why some have none; ``embeddings`` is (n, dim) float32."""

    @property
    def embeddings(self) -> FloatArray:
        """(n, dim) float32; zero for a row named in ``faults``."""
        return self.values


class Encoder:
    """One model on one device. ``encode`` is the only verb."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        device: str,
        threads: int = 1,
        trust_remote_code: bool = False,
        packed: bool | None = None,
    ) -> None:
        """Load the model that ``spec`` names, and refuse any other.

        Args:
            spec: the model as the run was planned with it.
            device: a torch device, such as cpu or cuda.
            threads: CPU threads of this process's forward passes.
            trust_remote_code: run Python code found in the model folder.
            packed: run without padding; None where it is known to be right and faster.

        Raises:
            ModelError: the weights here are not those of the spec, or some would stay random.
        """
        torch.set_num_threads(threads)
        self.spec = spec
        self._executor = prepare_executor(
            spec.name,
            spec.revision,
            spec.weights_sha256,
            KIND,
            spec.pooling,
            self._compute,
            dtype=spec.dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            packed=packed,
        )
        self.device = self._executor.device

    def cut(self, lengths: np.ndarray, budget: int) -> list[IdArray]:
        """Cut rows of (n,) ``lengths`` into batches of at most ``budget`` tokens, as this encoder counts."""
        return token_budget_batches(lengths, budget, packed=self._executor.packed)

    def empty_result(self, n_rows: int) -> Encoded:
        """Return a result of n rows that `encode` fills."""
        return Encoded(np.zeros((n_rows, self.spec.dim), dtype=np.float32))

    def warm_up(self, budget: int) -> None:
        """Encode a batch of the longest rows for nothing: kernels are loaded, and memory is claimed."""
        tokens = longest_rows(self.spec.max_length, budget)
        self.encode(tokens, self.cut(tokens.lengths, budget), self.empty_result(len(tokens)))

    def encode(self, tokens: PackedTokens, batches: Sequence[IdArray], result: Encoded) -> None:
        """Encode the rows of the given batches into ``result``.

        A batch that does not fit in memory is halved and tried again; a single row that does not
        fit, or whose vector is not finite even in float32, is named in ``faults``.

        Args:
            tokens: n rows.
            batches: row numbers of each forward pass, as `cut` makes them.
            result: of `empty_result(n)`; rows in no batch are left as they are.

        Raises:
            RuntimeError: whatever the model raises that is not a lack of memory.
        """
        self._executor.run(Rows(tokens), batches, result)

    def _compute(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        hidden = model(**inputs.arguments).last_hidden_state
        vectors = pool(hidden, inputs, self.spec.pooling)
        if vectors.shape[-1] != self.spec.dim:
            raise ModelError(
                f"{self.spec.name}: its vectors have {vectors.shape[-1]} dimensions, not {self.spec.dim}"
            )
        return F.normalize(vectors, dim=-1) if self.spec.normalize else vectors
