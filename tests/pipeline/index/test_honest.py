"""What index.json says is true: of recall, training and files; on a real Ray, local folders."""

from pathlib import Path

import numpy as np
import pytest

from bge_ray.errors import IndexBuildError, RecallError
from bge_ray.index.search import load_index, search
from bge_ray.index.topk import exact_topk, merge_topk
from bge_ray.pipeline.index.job import build_index, index_outcome
from bge_ray.pipeline.index.published import index_files
from bge_ray.settings.sections import Settings, parse_settings
from bge_ray.storage.objects import Storage
from tests.support.vectors import VectorDataset, clustered

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

STORAGE = Storage(20)
DIM = 64


def settings_for(root: Path, *overrides: str) -> Settings:
    keys = ("index.num_queries=300", "index.recall_k=10", "index.part_bytes=400000")
    return parse_settings(None, [f"output.uri={root}", *keys, *overrides])


def made_of(root: Path, *shards: np.ndarray, first: int = 0) -> VectorDataset:
    made = VectorDataset(str(root), DIM)
    for number, vectors in enumerate(shards, first):
        made.put(number, vectors)
    made.publish()
    return made


def uniform(rows: int, seed: int) -> np.ndarray:
    """Unit vectors without any clusters: what a graph finds hardest."""
    vectors = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def recall_here(root: Path, index, queries: np.ndarray, vectors: list[np.ndarray], k: int) -> float:
    """The recall at k of the published files, for queries that were never seen, by brute force."""
    ids = [(number << 41) + (np.arange(len(some)) << 13) for number, some in enumerate(vectors)]
    _, truth = exact_topk(queries, zip(vectors, ids, strict=True), k)
    files = [load_index(Path(file.path)) for file in index_files(str(root), index)]
    _, found = merge_topk([search(file, queries, k, effort=index.effort) for file in files], k)
    return float(np.mean([len(set(f) & set(t)) / k for f, t in zip(found, truth, strict=True)]))


@pytest.mark.slow
def test_the_recall_of_a_graph_is_that_of_queries_it_does_not_hold(tmp_path: Path) -> None:
    shards = [uniform(1500, 1), uniform(1500, 2)]
    made_of(tmp_path, *shards)
    index = build_index(settings_for(tmp_path, "index.factory=HNSW8", "index.recall_target=0.8"))
    assert "not in the graphs" in index.queries
    assert 90 < index.num_queries < 220  # a twentieth of the rows
    assert index.effort >= 10  # never narrower than what is asked for
    unseen = recall_here(tmp_path, index, uniform(500, 3), shards, 10)
    claimed = index.recall["@10"]
    assert claimed.low - 0.01 <= unseen <= claimed.high + 0.01
    # The rows that were asked for are in the graph that is published, and find themselves.
    (file,) = index_files(str(tmp_path), index)
    opened = load_index(Path(file.path))
    assert (opened.ntotal, file.rows) == (3000, 3000)
    scores, _ = search(opened, np.concatenate(shards), 1, effort=300)
    assert (scores > 0.9999).mean() > 0.99


@pytest.mark.slow
def test_the_effort_is_tuned_for_the_searches_that_will_come(tmp_path: Path) -> None:
    """With 100 candidates scored again fewer lists do, or a code that misses the target reaches it."""
    shards = [clustered(3000, DIM, 1), clustered(3000, DIM, 2)]
    made_of(tmp_path, *shards)
    common = ("index.factory=RR,IVF32,RaBitQ", "index.recall_target=0.9")
    alone = build_index(settings_for(tmp_path, *common))
    assert (alone.reached, alone.k, alone.rescore) == (False, 10, 0)
    rescored = build_index(settings_for(tmp_path, *common, "search.rescore=100", "search.k=10"))
    assert (rescored.reached, rescored.k, rescored.rescore) == (True, 10, 100)
    assert rescored.effort < alone.effort
    assert rescored.recall["@10"].value >= 0.9 > rescored.recall_of_codes["@10"].value
    assert alone.reranked_candidates == 100
    deep = build_index(settings_for(tmp_path, *common, "index.recall_k=50", "index.rescore=500"))
    assert deep.tuned_recall == deep.recall["@50"]
    assert deep.rescored(100) == 1000
    files = [load_index(Path(file.path)) for file in index_files(str(tmp_path), deep)]
    queries = clustered(300, DIM, 9)
    ids = [(n << 41) + (np.arange(3000) << 13) for n in range(2)]
    _, truth = exact_topk(queries, zip(shards, ids, strict=True), 50)
    _, candidates = search(files[0], queries, 500, effort=deep.effort)
    unseen = np.mean([len(set(c) & set(t)) / 50 for c, t in zip(candidates, truth, strict=True)])
    assert deep.tuned_recall.low - 0.01 <= unseen <= deep.tuned_recall.high + 0.01


@pytest.mark.slow
def test_a_training_that_vectors_left_behind_is_done_anew_though_the_lists_stay_even(tmp_path: Path) -> None:
    """Vectors spread further than the code's ranges know: the lists do not tell, and the recall does."""
    centres = uniform(16, 4)
    tight = centres[np.arange(4000) % 16] + np.float32(0.02) * uniform(4000, 1)
    tight /= np.linalg.norm(tight, axis=1, keepdims=True)
    made = made_of(tmp_path, tight)
    settings = settings_for(
        tmp_path, "index.factory=IVF16,SQ8", "index.recall_target=0.8", "index.max_drift=1"
    )
    before = build_index(settings)
    assert before.reached
    made.remove(0)
    made.put(1, uniform(5000, 2))
    made.publish()
    after = build_index(settings)
    assert after.training.sha256 != before.training.sha256
    assert after.reached


@pytest.mark.slow
def test_a_missed_target_fails_the_run_that_built_it_and_no_other(tmp_path: Path) -> None:
    made = made_of(tmp_path, uniform(4000, 1))
    settings = settings_for(tmp_path, "index.factory=IVF16,RaBitQ", "index.recall_target=0.99")
    with pytest.raises(RecallError, match=r"0\.99 was not reached"):
        index_outcome(settings)
    assert "as the run that built it said" in index_outcome(settings)
    first = build_index(settings)
    made.put(1, uniform(100, 2))
    made.publish()
    second = build_index(settings)  # a training that missed the target when it was new is not blamed
    assert second.training == first.training
    retrained = build_index(settings_for(tmp_path, *tail(settings), "index.retrain=true"))
    assert retrained.training != first.training
    again = build_index(settings_for(tmp_path, *tail(settings), "index.retrain=true"))
    assert again == retrained  # it is of the data set as it is: nothing to do


def tail(settings: Settings) -> tuple[str, str]:
    return f"index.factory={settings.index.factory}", f"index.recall_target={settings.index.recall_target}"


@pytest.mark.slow
def test_a_data_set_that_shrank_keeps_the_training_it_has(tmp_path: Path) -> None:
    made = made_of(tmp_path, clustered(3000, DIM, 1), clustered(500, DIM, 2))
    settings = settings_for(tmp_path, "index.factory=IVF64,SQ8", "index.max_drift=1")
    first = build_index(settings)
    made.remove(0)
    made.publish()
    second = build_index(settings)  # 500 vectors, where a training asks for 39 x 64
    assert (second.ntotal, second.training) == (500, first.training)


@pytest.mark.slow
def test_what_is_damaged_is_named_with_the_way_out_and_made_anew(tmp_path: Path) -> None:
    made = made_of(tmp_path, clustered(4000, DIM, 1), clustered(4000, DIM, 2))
    settings = settings_for(tmp_path, "index.factory=IVF16,SQ8")
    verifying = settings_for(tmp_path, "index.factory=IVF16,SQ8", "index.verify=true")
    first = build_index(settings)
    (file,) = index_files(str(tmp_path), first)
    damage(Path(file.path))
    assert build_index(settings) == first  # as sizes tell, and that is why searches name index.verify
    healed = build_index(verifying)
    assert healed.files == first.files
    assert STORAGE.read(file.path)[-40] == before_damage[Path(file.path)]
    damage(tmp_path / "index" / first.parts[0])
    damage(tmp_path / "index" / first.training.path)
    made.put(2, clustered(500, DIM, 3))
    made.publish()
    with pytest.raises(IndexBuildError, match=r"index\.verify"):
        build_index(settings)
    assert build_index(verifying).ntotal == 8500


before_damage: dict[Path, int] = {}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    before_damage[path] = data[-40]
    data[-40] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.slow
def test_the_key_holds_all_that_decides(tmp_path: Path) -> None:
    made_of(tmp_path, clustered(2000, DIM, 1))
    keys = {build_index(settings_for(tmp_path, "index.factory=IVF16,SQ8")).inputs}
    for change in ("index.recall_k=20", "index.rescore=40", "index.max_drift=0.2", "search.rescore=200"):
        keys.add(build_index(settings_for(tmp_path, "index.factory=IVF16,SQ8", change)).inputs)
    assert len(keys) == 5
