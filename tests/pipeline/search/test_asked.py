"""What a search cannot do is refused by name before anything is written; no Ray."""

from pathlib import Path

import pytest

from bge_ray.errors import SettingsError
from bge_ray.pipeline.runs.source import Source
from bge_ray.pipeline.search.asked import Asked, settle_asked
from bge_ray.records.outputs import Output
from bge_ray.settings.sections import parse_settings
from bge_ray.storage.objects import Storage
from tests.support.vectors import VectorDataset, clustered

KINDS = {
    "embedding": ("dense", 32),
    "sparse": ("sparse", 100),
    "colbert": ("multi", 32),
    "bm25": ("sparse", 100),
}


def source_of(root: Path, *outputs: str, normalize: bool = True) -> Source:
    """A data set that says it has these outputs; what its shards hold is not looked at."""
    made = tuple(Output(name, *KINDS[name], "float16") for name in outputs)
    dataset = VectorDataset(str(root), normalize=normalize)
    dataset.put(0, clustered(5, 32, seed=1))
    manifest = dataset.publish()
    spec = VectorDataset(str(root / "said"), outputs=made, normalize=normalize).spec
    return Source(Storage(5), str(root), spec, manifest)


def settle(source: Source, *asked: str) -> Asked:
    return settle_asked(parse_settings(None, [f"search.{word}" for word in asked]).search, source)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (["first_stage=sparse"], "search.first_stage sparse: .* has no output sparse, only embedding"),
        (["first_stage=bm25"], "search.first_stage bm25: .* embed with bm25 among model.outputs, into"),
        (["first_stage=hybrid"], "of which 1 can be searched"),
        (["first_stage=hybrid", "hybrid=[dense, bm25]"], "search.hybrid bm25: .* has no output bm25"),
        (["rescore_with=colbert"], "search.rescore_with colbert: .* of bge-m3 or a model tuned from it"),
    ],
)
def test_an_output_that_the_data_set_lacks(tmp_path: Path, asked: list[str], why: str) -> None:
    source = source_of(tmp_path, "embedding")
    with pytest.raises(SettingsError, match=why):
        settle(source, *asked)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (["hybrid=[dense, bm25]"], "hybrid: does nothing unless first_stage is hybrid"),
        (["fusion=minmax"], "fusion: does nothing unless first_stage is hybrid"),
        (["first_stage=hybrid", "hybrid=dense"], "hybrid: must be different first stages, at least two"),
        (["first_stage=hybrid", "hybrid=[dense, dense]"], "hybrid: must be different first stages"),
        (["first_stage=hybrid", "hybrid_weights=[1, 2]"], "hybrid_weights: must be one for each of hybrid"),
        (
            ["first_stage=hybrid", "hybrid=[dense, bm25]", "hybrid_weights=[1]"],
            "hybrid_weights: must be one for each of hybrid, which names 2",
        ),
        (["rescore_weights=[1]"], "rescore_weights: must be one for each of rescore_with, which names 0"),
        (["rescore_with=[sparse, colbert]", "rescore_weights=[0, 0]"], "above 0 together"),
        (["rescore_with=[sparse, colbert]", "rescore_weights=[1, -1]"], "must be 0 or more"),
        (["rescore_with=[sparse, sparse]"], "rescore_with: an output is named twice"),
        (["first_stage=hybrid", "candidates=10", "k=20"], r"candidates: must be at least k \(20\)"),
        (["candidates=200"], "candidates: are k unless first_stage is hybrid, or rescore_with is set"),
        (["replicas=3", "num_searchers=2"], r"replicas: must be at most num_searchers \(2\)"),
        (["replicas=2", "exact=true"], "replicas: with exact no index is searched"),
        (["sparse=approximate"], "sparse: is of the weights of tokens, which dense does not search"),
        (["sparse=approximate", "first_stage=bm25"], "which bm25 does not search; leave it out"),
        (
            ["sparse=approximate", "first_stage=hybrid", "hybrid=[dense, bm25]"],
            "which dense, bm25 does not search",
        ),
        (
            ["sparse=approximate", "first_stage=sparse", "filter=year > 3"],
            "sparse: approximate knows no filter; set it to exact, or leave filter and filter_column out",
        ),
        (["sparse=approximate", "first_stage=sparse", "filter_column=only"], "approximate knows no filter"),
        (["sparse_recall=0.9", "first_stage=sparse"], "sparse_recall: does nothing unless sparse is approx"),
        (["sparse=approximate", "sparse_recall=0", "first_stage=sparse"], "greater than 0"),
        (["first_stage=lexical"], "'dense', 'sparse' or 'bm25'"),
        (["bm25_b=1.5"], "less than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit_each_other(asked: list[str], why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        parse_settings(None, [f"search.{word}" for word in asked])


def test_what_acts_on_an_index_that_is_not_searched(tmp_path: Path) -> None:
    source = source_of(tmp_path, "bm25")
    for name in ("nprobe=8", "rescore=200", "replicas=2"):
        with pytest.raises(SettingsError, match=f"search.{name.partition('=')[0]}: of the index of the vec"):
            settle(source, "first_stage=bm25", name)
    both = source_of(tmp_path / "both", "embedding", "sparse")
    with pytest.raises(SettingsError, match=r"search.rescore 150: must be 0, or at least search.candidates"):
        settle(both, "first_stage=hybrid", "candidates=200", "rescore=150")


def test_vectors_of_other_norms_are_searched_by_tokens_alone(tmp_path: Path) -> None:
    source = source_of(tmp_path, "embedding", "bm25", normalize=False)
    with pytest.raises(SettingsError, match="its vectors are not normalised"):
        settle(source)
    assert settle(source, "first_stage=bm25").found_by == ("bm25",)


def test_an_approximate_search_of_weights_that_are_not_there(tmp_path: Path) -> None:
    source = source_of(tmp_path, "embedding", "bm25")
    with pytest.raises(SettingsError, match=r"search.sparse approximate: .* has no output sparse, so that"):
        settle(source, "first_stage=hybrid", "sparse=approximate")


def test_hybrid_takes_all_there_is_and_queries_need_what_is_compared(tmp_path: Path) -> None:
    source = source_of(tmp_path, "embedding", "sparse", "colbert", "bm25")
    asked = settle(source, "first_stage=hybrid", "rescore_with=[colbert, sparse]", "candidates=300")
    assert asked.found_by == ("embedding", "sparse", "bm25")
    assert asked.of_queries == ("embedding", "sparse", "bm25", "colbert")
    assert asked.combining is not None
    scores = ("embedding_score", "sparse_score", "bm25_score", "colbert_score", "fused_score")
    assert asked.combining.columns == scores
    assert not asked.is_dense and settle(source).is_dense
    alone = settle(source, "rescore_with=colbert")
    assert alone.combining is not None and alone.combining.columns == ("embedding_score", "colbert_score")
