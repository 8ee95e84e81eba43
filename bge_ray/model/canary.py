"""Canaries: what a model makes of fixed texts, by which a later run sees that it still makes the same.

The hash of the weights cannot tell that another version of a tokenizer or of transformers reads the same
files in another way; the vectors can.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bge_ray.errors import DatasetMismatchError, ModelError
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.run.batching import CPU_TOKEN_BUDGET
from bge_ray.records.arrays import dense_rows, multi_rows, sparse_rows
from bge_ray.records.model import Canary
from bge_ray.records.outputs import Output

if TYPE_CHECKING:  # counts of tokens are checked where there is no torch
    from bge_ray.model.run.model import Model
    from bge_ray.model.run.terms import TermModel

_SENTENCE = (
    "Rain fell on the harbour all morning; by noon 3 of the 12 boats had left, "
    "and those who stayed (most of them) mended their nets, drank tea and talked about the price of fuel. "
)
# Never to be changed: data sets hold the vectors of these. The last is longer than most models read.
CANARY_TEXTS = (
    "The quick brown fox doesn't jump over 13 lazy dogs.",
    "为了检索相关文章，请把这个句子变成一个向量。",  # noqa: RUF001 - the full-width comma is meant
    _SENTENCE * 25,
)
# Kernels and machines differ in the last bits of a cosine, half precision in its fourth digit, bfloat16 in
# its third, the more the deeper a model is.
LEAST_COSINES = {"float32": 0.99999, "float16": 0.999, "bfloat16": 0.99}
# Weights of a sparse output are added up by index modulo this: one of the whole vocabulary is a megabyte.
FOLDED = 256


def make_canaries(model: "Model | TermModel", feeder: TextFeeder) -> tuple[Canary, ...]:
    """Run the fixed texts as passages and return a canary for each of them and each output.

    Raises:
        ModelError: a text has no vector.
    """
    vectors = _encode(model, feeder, CANARY_TEXTS)
    return tuple(
        Canary(text, name, model.spec.dtype, tuple(array[row].tolist()))
        for name, array in vectors.items()
        for row, text in enumerate(CANARY_TEXTS)
    )


def check_canaries(stored: Sequence[Canary], model: "Model | TermModel", feeder: TextFeeder) -> None:
    """Refuse a model that makes other vectors of the stored canaries' texts than the one that made them.

    Args:
        stored: of the data set; those of outputs that this run makes no use of are passed by.
        model: the model at hand, with the weights of the data set.
        feeder: of the model at hand.

    Raises:
        DatasetMismatchError: names the text, the cosine and the likely cause.
        ModelError: a text has no vector.
    """
    texts = tuple(dict.fromkeys(canary.text for canary in stored))
    vectors = _encode(model, feeder, texts)
    for canary in stored:
        if canary.output not in vectors:
            continue
        found = vectors[canary.output][texts.index(canary.text)]
        cosine = _cosine(np.asarray(canary.vector), found)
        least = min(LEAST_COSINES[dtype] for dtype in (canary.dtype, model.spec.dtype))
        if not cosine >= least:
            raise DatasetMismatchError(
                f"{model.spec.name}: has the weights that the data set was made with, and makes other "
                f"vectors: {canary.output} of {canary.text[:60]!r} has cosine {cosine:.6f} with the stored "
                f"one, where at least {least} is due. Another version of transformers or tokenizers is the "
                "likely cause: take the one the data set was made with, or embed anew into another folder"
            )


def _encode(
    model: "Model | TermModel", feeder: TextFeeder, texts: Sequence[str]
) -> dict[str, npt.NDArray[np.floating]]:
    """Return (n, length) of each output, as canaries hold it."""
    tokens = feeder.passages(texts)
    result = model.empty_result(len(tokens))
    model.run(tokens, model.cut(tokens, CPU_TOKEN_BUDGET), result)
    for row, (reason, detail) in sorted(result.faults.items()):
        raise ModelError(f"{model.spec.name}: no vector of {texts[row][:60]!r}: {reason}, {detail}")
    columns = result.columns()
    return {o.name: _vectors(o, columns[o.name]) for o in model.spec.outputs if o.kind != "scalar"}


def _vectors(output: Output, column: pa.Array) -> npt.NDArray[np.floating]:
    """Return one vector a row: of a multi-vector the mean, of a sparse output its weights, folded."""
    if output.kind == "dense":
        return dense_rows(column)
    if output.kind == "multi":
        rows = multi_rows(column, output.dtype)
        sums = np.add.reduceat(rows.vectors.astype(np.float32), rows.offsets[:-1], axis=0)
        return np.asarray(sums / np.diff(rows.offsets)[:, None])
    weights = sparse_rows(column)
    folded = np.zeros((len(column), FOLDED), np.float32)
    np.add.at(folded, (weights.row_numbers, weights.indices % FOLDED), weights.values)
    return folded


def _cosine(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    if a.shape != b.shape:
        return float("nan")
    a, b = a.astype(np.float64), b.astype(np.float64)
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    if size:
        return float(a @ b) / size
    return 1.0 if not a.any() and not b.any() else float("nan")  # a text may have no weight at all
