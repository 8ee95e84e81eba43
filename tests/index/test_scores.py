"""Scores of stored columns equal those of FlagEmbedding's own model, and brute force."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bge_ray.index.scores import colbert_scores, dense_scores, sparse_scores, weighted_scores
from bge_ray.model.spec import text_feeder
from bge_ray.records.arrays import MultiRows, SparseRows, dense_rows, multi_rows, sparse_rows
from tests.model.conftest import load, resolve, run
from tests.support.models import SENTENCES, make_m3
from tests.support.slow import slow_but

QUERIES = [*SENTENCES[:3], "the fox 为这个句子", ""]
PASSAGES = [*SENTENCES[:5], "the dog " * 60, "python reads a file, line by line: 0 1 2"]
# Of dense, sparse and ColBERT: what FlagEmbedding's readme, its benchmarks and their defaults take.
WEIGHTS = [(1, 1, 1), (0.4, 0.2, 0.4), (0.15, 0.5, 0.35), (0.2, 0.4, 0.4), (1, 0.3, 1), (1, 0.1, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of so many dimensions that what half precision rounds off evens out, as it does in bge-m3."""
    return make_m3(tmp_path_factory.mktemp("m3") / "model", dim=256, pickled=True)


@pytest.mark.parity
@pytest.mark.parametrize("stored", slow_but(["float16"], ["float16", "float32"]))
def test_equal_flagembedding(folder: Path, tmp_path: Path, stored: str) -> None:
    from FlagEmbedding import BGEM3FlagModel

    spec = resolve(folder, outputs=("embedding", "sparse", "colbert")).stored_as(stored)
    model, feeder = load(spec), text_feeder(spec)
    columns = [run(model, feeder.passages(texts)).columns() for texts in (QUERIES, PASSAGES)]
    pq.write_table(pa.table(columns[1]), tmp_path / "x.parquet")
    queries, passages = pa.table(columns[0]), pq.read_table(tmp_path / "x.parquet")
    dense, sparse = dense_rows(passages["embedding"]), sparse_rows(passages["sparse"])
    colbert = multi_rows(passages["colbert"], spec.output("colbert").dtype)

    flag = BGEM3FlagModel(str(folder), use_fp16=False, devices="cpu")
    for number, query in enumerate(QUERIES):
        row = queries.slice(number, 1)
        ours = [
            dense_scores(dense_rows(row["embedding"])[0], dense),
            sparse_scores(sparse_rows(row["sparse"]), sparse),
            colbert_scores(multi_rows(row["colbert"], spec.output("colbert").dtype).vectors, colbert),
        ]
        pairs = [(query, passage) for passage in PASSAGES]
        for weights in WEIGHTS if not number else WEIGHTS[:2]:
            # One pair a batch: FlagEmbedding's ColBERT score depends on the padding of the others.
            theirs = flag.compute_score(
                pairs,
                batch_size=1,
                max_query_length=128,
                max_passage_length=128,
                weights_for_different_modes=list(weights),
            )
            both = weighted_scores(ours[:2], weights[:2])
            all_three = weighted_scores(ours, weights)
            for name, mine in zip(
                ("dense", "sparse", "colbert", "sparse+dense", "colbert+sparse+dense"),
                (*ours, both, all_three),
                strict=True,
            ):
                np.testing.assert_allclose(
                    mine, theirs[name], atol=1e-4, rtol=0, err_msg=f"{name} of {query!r}"
                )


def test_brute_force_over_rows_of_every_length() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 6, 40)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    vectors = rng.standard_normal((offsets[-1], 8)).astype(np.float16)
    query = rng.standard_normal((3, 8)).astype(np.float16)
    truth = [
        (query.astype(np.float32) @ vectors[a:b].astype(np.float32).T).max(1).mean() if b > a else 0.0
        for a, b in itertools.pairwise(offsets)
    ]
    np.testing.assert_allclose(colbert_scores(query, MultiRows(offsets, vectors)), truth, rtol=1e-5)

    indices = np.concatenate([np.sort(rng.choice(12, n, replace=False)) for n in lengths]).astype(np.int32)
    values = rng.random(offsets[-1]).astype(np.float16)
    asked = {1: 0.5, 4: 0.25, 11: 2.0}
    one = SparseRows(
        np.array([0, 3]), np.array(list(asked), np.int32), np.array(list(asked.values()), np.float16)
    )
    truth = [
        sum(asked.get(int(i), 0.0) * float(v) for i, v in zip(indices[a:b], values[a:b], strict=True))
        for a, b in itertools.pairwise(offsets)
    ]
    np.testing.assert_allclose(
        sparse_scores(one, SparseRows(offsets, indices, values)), truth, rtol=1e-5, atol=1e-7
    )
    nothing = SparseRows(np.array([0, 0]), np.zeros(0, np.int32), np.zeros(0, np.float16))
    assert sparse_scores(nothing, SparseRows(offsets, indices, values)).tolist() == [0.0] * 40


def test_all_products_negative_is_no_zero() -> None:
    assert colbert_scores(np.array([[1.0, 0.0]]), MultiRows(np.array([0, 1]), np.array([[-1.0, 0.0]]))) == [
        -1.0
    ]


def test_weights_that_come_to_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="their sum must be above 0"):
        weighted_scores([np.zeros(1), np.zeros(1)], [0, 0])
    with pytest.raises(ValueError, match="shorter"):
        weighted_scores([np.zeros(1), np.zeros(1)], [1, 1, 1])
