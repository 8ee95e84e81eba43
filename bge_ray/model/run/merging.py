"""The arithmetic of merged models: weighted means of tensors, and the losses that weights are made of."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from safetensors import safe_open

from bge_ray.errors import ModelError
from bge_ray.model.merge import Tensor, WeightFile
from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import model_folder, resolve_encoder, text_feeder
from bge_ray.records.ids import FloatArray
from bge_ray.records.model import EMBEDDING
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import ModelSettings

# As LM-Cocktail has them: queries of a batch, negatives of each, and by what a cosine is divided.
BATCH, NEGATIVES, TEMPERATURE = 2, 7, 0.05
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ALIGNED = 8


def merged_bytes(file: WeightFile, weights: Sequence[float]) -> Iterator[bytes]:
    """Yield a safetensors file: its header, then one tensor after the other.

    Memory: two tensors in float32.

    Args:
        file: what it holds.
        weights: of the models, in their order.

    Raises:
        ModelError: a merged number is not finite in the dtype of the first model.
    """
    yield _header(file.tensors)
    with ExitStack() as stack:
        opened = {
            path: stack.enter_context(safe_open(path, framework="pt"))
            for path in sorted({path for tensor in file.tensors for path in tensor.files})
        }
        for tensor in file.tensors:
            parts = (opened[path].get_tensor(tensor.name) for path in tensor.files)
            if len(tensor.files) == 1:
                merged = next(parts)
            else:
                merged = _mean(parts, weights, tensor)
            yield merged.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _mean(parts: Iterator[torch.Tensor], weights: Sequence[float], tensor: Tensor) -> torch.Tensor:
    total: torch.Tensor | None = None
    dtype = torch.float32
    for part, weight in zip(parts, weights, strict=True):
        if total is None:
            dtype = part.dtype
            total = torch.zeros(part.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        total.add_(part.to(total.dtype), alpha=weight)
    if total is None:
        raise ModelError(f"merge.models: no model has {tensor.name}")
    merged = total.to(dtype)
    if not torch.isfinite(merged).all():
        raise ModelError(f"merge.models: {tensor.name} has a merged number that is not finite in {dtype}")
    return merged


def _header(tensors: Sequence[Tensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        if tensor.dtype not in _BYTES:
            raise ModelError(
                f"merge.models: {tensor.name} is of the type {tensor.dtype}, which is not merged"
            )
        stop = start + tensor.numbers * _BYTES[tensor.dtype]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


def example_loss(asked: ModelSettings, queries: Sequence[str], passages: Sequence[str]) -> float:
    """Return the mean loss of an embedding model over examples, as LM-Cocktail reckons it.

    Args:
        asked: the model, and how it is read.
        queries: n texts, n at least 1.
        passages: n * (1 + NEGATIVES) texts; the first of each query's is its positive.

    Raises:
        ModelError: the model is not to be had, or makes no vector of a text.
    """
    spec = resolve_encoder(asked, on_gpu=False)
    feeder = text_feeder(spec, trust_remote_code=asked.trust_remote_code)
    place = Place(threads=os.cpu_count() or 1, trust_remote_code=asked.trust_remote_code)
    model = Model(spec, model_folder(spec), place)
    return group_loss(_vectors(model, feeder.queries(queries)), _vectors(model, feeder.passages(passages)))


def _vectors(model: Model, tokens: PackedTokens) -> FloatArray:
    result = model.empty_result(len(tokens.lengths))
    model.run(tokens, model.cut(tokens, model.settle_budget("auto")), result)
    if result.faults:
        raise ModelError(
            f"merge.examples: {model.spec.name} makes no vector of {len(result.faults)} of their texts"
        )
    found = result.array(EMBEDDING).astype(np.float32)
    unit: FloatArray = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


def group_of(texts: Sequence[str], negatives: Sequence[str]) -> list[str]:
    """Return the passages of an example: its first positive, and its first negatives, over again if few."""
    repeated = list(negatives) * math.ceil(NEGATIVES / len(negatives))
    return [texts[0], *repeated[:NEGATIVES]]


def group_loss(queries: FloatArray, passages: FloatArray) -> float:
    """Return the mean cross-entropy of queries over the passages of their batches, by cosine over 0.05.

    A batch has two queries, in their order, and each sees the passages of both.

    Args:
        queries: (n, dim) of unit norm.
        passages: (n * (1 + NEGATIVES), dim) of unit norm; the first of each query's is its positive.
    """
    width, losses = 1 + NEGATIVES, []
    for start in range(0, len(queries), BATCH):
        batch = queries[start : start + BATCH]
        scores = batch @ passages[start * width : (start + len(batch)) * width].T / TEMPERATURE
        scores = scores.astype(np.float64) - scores.max(axis=1, keepdims=True)
        own = scores[np.arange(len(batch)), np.arange(len(batch)) * width]
        losses.append(float(np.mean(np.log(np.exp(scores).sum(axis=1)) - own)))
    return float(np.mean(losses))


def loss_weights(losses: Sequence[float], temperature: float) -> list[float]:
    """Return weights that sum to 1, the greater the smaller a model's loss is: a softmax over -loss."""
    scaled = -np.array(losses, np.float64) / temperature
    parts = np.exp(scaled - scaled.max())
    return [float(part) for part in parts / parts.sum()]
