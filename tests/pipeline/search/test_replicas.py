"""An index that is held several times: every replica answers alike, and the store gives each byte once."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.actor import ActorHandle

from bge_ray.errors import DamagedIndexError, SettingsError
from bge_ray.index.factory import Metric
from bge_ray.index.package import faiss
from bge_ray.index.search import search
from bge_ray.index.train import train
from bge_ray.pipeline.engine.pools import Pool
from bge_ray.pipeline.index.searchers import search_all
from bge_ray.pipeline.index.tasks import WrittenFile
from bge_ray.pipeline.search.replicas import replicas_of, start_index
from bge_ray.storage.objects import Storage
from tests.support.vectors import clustered

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

DIM, ROWS, K = 16, 300, 12
QUERIES = clustered(40, DIM, 99)


def written(folder: Path, n_files: int) -> list[WrittenFile]:
    """Files of an IVF index with different vectors, as its ranges are."""
    trained = train(clustered(2000, DIM, 7), "IVF16,SQ8", Metric.L2)
    files = []
    for number in range(n_files):
        index = trained.open()
        index.add_with_ids(clustered(ROWS, DIM, number), np.arange(ROWS) + number * ROWS)
        path = folder / f"{number}.faiss"
        faiss.write_index(index, str(path))
        data = path.read_bytes()
        files.append(WrittenFile(str(path), len(data), hashlib.sha256(data).hexdigest(), ROWS))
    return files


def stopped(replicas: tuple[tuple[ActorHandle, ...], ...]) -> None:
    for actor in (actor for replica in replicas for actor in replica):
        ray.kill(actor)


def test_replicas_take_their_files_from_each_other_and_answer_alike(tmp_path: Path) -> None:
    files = written(tmp_path, 3)
    indexes = [faiss.read_index(file.path) for file in files]
    truth = [search(index, QUERIES, K, effort=4) for index in indexes]
    best = np.sort(np.concatenate([scores for scores, _ in truth], axis=1), axis=1)[:, ::-1][:, :K]
    filters = ray.put({})
    replicas = start_index(Storage(20), files, Pool(8, 0.0, 0.0, 1), 4, filters, asked=True)
    try:
        assert [len(replica) for replica in replicas] == [2, 2, 2, 2]
        for number, replica in enumerate(replicas):
            for chooser in (None, replica[0], replica[1]):
                scores, ids = search_all(replica, QUERIES, K, 4, lambda: None, chooser=chooser)
                np.testing.assert_allclose(scores, best, atol=1e-6)
                assert ids.min() >= 0
            if not number:
                for file in files:  # the store is not asked again
                    Path(file.path).unlink()
        # One that starts anew takes its files from where the first time, and the first of all has none.
        ray.kill(replicas[3][0], no_restart=False)
        again, _ = search_all(replicas[3], QUERIES, K, 4, lambda: None)
        np.testing.assert_allclose(again, best, atol=1e-6)
        ray.kill(replicas[0][0], no_restart=False)
        with pytest.raises(DamagedIndexError, match="is not there"):
            search_all(replicas[0], QUERIES, K, 4, lambda: None)
    finally:
        stopped(replicas)


def test_a_damaged_file_is_told_by_whoever_chooses_the_lists(tmp_path: Path) -> None:
    files, filters = written(tmp_path, 2), ray.put({})
    Path(files[0].path).write_bytes(b"\0" * files[0].bytes)
    replicas = start_index(Storage(20), files, Pool(2, 0.0, 0.0, 1), 1, filters, asked=False)
    try:
        with pytest.raises(
            DamagedIndexError, match=r"0\.faiss: is damaged.*run bge-ray index with index.verify"
        ):
            search_all(replicas[0], QUERIES, K, 4, lambda: None, chooser=replicas[0][0])
    finally:
        stopped(replicas)


def test_how_often_an_index_is_held() -> None:
    assert replicas_of(3, 1, 100) == 3
    assert replicas_of(None, 4, 100) == 1
    assert replicas_of(None, 1, 100) == len([node for node in ray.nodes() if node["Resources"].get("CPU")])
    assert replicas_of(None, 1, 1) == 1
    with pytest.raises(SettingsError, match=r"search\.replicas 3: the actors .* are 2; .*num_searchers"):
        start_index(Storage(20), [], Pool(2, 0.0, 0.0, 1), 3, ray.put({}), asked=True)
    # As many as there are actors, where nobody asked for more: two nodes, and search.num_searchers 1.
    fewer = start_index(Storage(20), [], Pool(1, 0.0, 0.0, 1), 2, ray.put({}), asked=False)
    assert [len(replica) for replica in fewer] == [1]
    stopped(fewer)
