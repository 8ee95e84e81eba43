"""The encoder: packed token ids in, one vector a row out; knows no files, no corpus and no Ray."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name the field uses
from transformers import AutoModel

from bge_ray.errors import ModelError
from bge_ray.manifest import ModelSpec
from bge_ray.model.source import fetch_model, hash_model
from bge_ray.schema import FloatArray, IdArray, PackedTokens

# Models whose classes take add_pooling_layer; the layer on top of CLS is not part of an embedding.
HAS_POOLER_SWITCH = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet"}


@dataclass
class Encoded:
    """Vectors of n rows, and why some have none.

    ``embeddings`` is (n, dim) float32; a row named in ``faults`` (row to reason and detail) is zero.
    ``padded_tokens`` counts what was computed, padding included; ``busy_s`` the time it took.
    """

    embeddings: FloatArray
    faults: dict[int, tuple[str, str]] = field(default_factory=dict)
    batches: int = 0
    padded_tokens: int = 0
    busy_s: float = 0.0


class Encoder:
    """One model on one device. ``encode`` is the only verb."""

    def __init__(
        self, spec: ModelSpec, *, device: str, threads: int = 1, trust_remote_code: bool = False
    ) -> None:
        """Load the model that ``spec`` names, and refuse any other.

        Args:
            spec: the model as the run was planned with it.
            device: a torch device, such as cpu or cuda.
            threads: CPU threads of this process's forward passes.
            trust_remote_code: run Python code found in the model folder.

        Raises:
            ModelError: the weights here are not those of the spec, or some would stay random.
        """
        torch.set_num_threads(threads)
        folder, _ = fetch_model(spec.name, spec.revision)
        if hash_model(str(folder)) != spec.weights_sha256:
            raise ModelError(
                f"{folder}: its files differ from those the run was planned with; give every node the same model folder"
            )
        self.spec = spec
        self.device = torch.device(device)
        self._model = load_model(folder, getattr(torch, spec.dtype), trust_remote_code=trust_remote_code).to(
            self.device
        )
        self._float32_model: torch.nn.Module | None = None

    def empty_result(self, n_rows: int) -> Encoded:
        """Return a result of n rows that `encode` fills."""
        return Encoded(np.zeros((n_rows, self.spec.dim), dtype=np.float32))

    def encode(self, tokens: PackedTokens, batches: Sequence[IdArray], result: Encoded) -> None:
        """Encode the rows of the given batches into ``result``.

        A batch that does not fit in memory is halved and tried again; a single row that does not
        fit, or whose vector is not finite even in float32, is named in ``faults``.

        Args:
            tokens: n rows.
            batches: row numbers of each forward pass, as `token_budget_batches` makes them.
            result: of `empty_result(n)`; rows in no batch are left as they are.
        """
        started = time.perf_counter()
        for batch in batches:
            self._encode_batch(tokens, batch, result)
        result.busy_s += time.perf_counter() - started

    def _encode_batch(self, tokens: PackedTokens, rows: IdArray, result: Encoded) -> None:
        try:
            vectors = self._forward(self._model, tokens, rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            vectors = None
        if vectors is None:  # outside the handler: the traceback would keep the batch's tensors alive
            self._split_batch(tokens, rows, result)
            return
        result.batches += 1
        result.padded_tokens += len(rows) * int(tokens.lengths[rows].max())
        finite = np.isfinite(vectors).all(axis=1)
        result.embeddings[rows[finite]] = vectors[finite]
        for row in rows[~finite]:
            self._retry_in_float32(tokens, int(row), result)

    def _split_batch(self, tokens: PackedTokens, rows: IdArray, result: Encoded) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(rows) == 1:
            detail = f"{tokens.lengths[rows[0]]} tokens do not fit in the memory of {self.device}"
            result.faults[int(rows[0])] = ("out_of_memory", detail)
            return
        middle = len(rows) // 2
        self._encode_batch(tokens, rows[:middle], result)
        self._encode_batch(tokens, rows[middle:], result)

    def _retry_in_float32(self, tokens: PackedTokens, row: int, result: Encoded) -> None:
        if self.spec.dtype != "float32":
            if self._float32_model is None:
                self._float32_model = copy.deepcopy(self._model).float()
            vector = self._forward(self._float32_model, tokens, np.asarray([row], dtype=np.int64))
            if np.isfinite(vector).all():
                result.embeddings[row] = vector[0]
                return
        result.faults[row] = (
            "non_finite",
            f"the vector holds NaN or infinity in {self.spec.dtype} and in float32",
        )

    @torch.inference_mode()
    def _forward(self, model: torch.nn.Module, tokens: PackedTokens, rows: IdArray) -> FloatArray:
        """Return (rows, dim) float32 vectors of one padded forward pass."""
        lengths = tokens.lengths[rows]
        width = int(lengths.max())
        filled = np.arange(width) < lengths[:, None]  # (rows, width)
        input_ids = np.zeros(filled.shape, dtype=np.int64)
        input_ids[filled] = np.concatenate(
            [tokens.input_ids[tokens.offsets[r] : tokens.offsets[r + 1]] for r in rows]
        )
        mask = torch.from_numpy(filled).to(self.device)
        hidden = model(
            input_ids=torch.from_numpy(input_ids).to(self.device), attention_mask=mask.long()
        ).last_hidden_state  # (rows, width, dim)
        vectors = pool(hidden, mask, self.spec.pooling).float()
        if self.spec.normalize:
            vectors = F.normalize(vectors, dim=-1)
        return np.asarray(vectors.cpu().numpy(), dtype=np.float32)


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Reduce token states to one vector a row.

    Args:
        hidden: (rows, width, dim), padding on the right.
        mask: (rows, width) bool, True for tokens.
        pooling: cls, mean or last_token.

    Returns:
        (rows, dim) in the dtype of ``hidden``.
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)
    last = mask.sum(1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def load_model(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool) -> torch.nn.Module:
    """Load a bare encoder from safetensors, in evaluation mode.

    Raises:
        ModelError: a weight is missing from the files and would stay random.
    """
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    # Its table of unused weights (the pooler, a masked-language head) reads like an error and is none.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        if config.model_type in HAS_POOLER_SWITCH and not getattr(config, "auto_map", None):
            options["add_pooling_layer"] = False
        model, info = AutoModel.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} weights are not in its files and would be random, such as {missing[0]}"
        )
    loaded: torch.nn.Module = model.eval()
    return loaded


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a real lack of memory from every other RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU allocator has no exception type of its own.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error) and "memory" in str(error)


def is_broken_device(error: BaseException) -> bool:
    """Tell a failed CUDA context (device-side assert, lost device), which only a new process mends."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)
