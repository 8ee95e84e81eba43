"""Checkpoints in storage: whole or not there, the newest first, nobody else's."""

from pathlib import Path

import pytest

from bge_ray.errors import StorageError
from bge_ray.pipeline.train import stored as stored_module
from bge_ray.pipeline.train.loop import CURVE_POINTS, thinned
from bge_ray.pipeline.train.stored import OWN_WORK, StoredFolder, remove_older, restore, store, stored
from bge_ray.records.reports import TrainStep
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.sweep import sweep_work


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_module, "PIECE_BYTES", 10)


def keep(
    storage: Storage, work: str, local: Path, step: int, key: str = "k", attempt: str = "0" * 8
) -> StoredFolder:
    return store(storage, work, local, kind="checkpoint", key=key, step=step, attempt=attempt, curve=())


def local_folder(path: Path) -> Path:
    (path / "1_Pooling").mkdir(parents=True)
    (path / "empty").write_bytes(b"")
    (path / "1_Pooling" / "config.json").write_bytes(b"x" * 10)
    (path / "model.safetensors").write_bytes(bytes(range(25)))
    return path


def test_what_is_stored_comes_back(storage: Storage, root: str, tmp_path: Path) -> None:
    work, local = join(root, "work"), local_folder(tmp_path / "local")
    assert stored(storage, work, "checkpoint", "k") == []
    curve = (TrainStep(1, 0.5, 1e-5),)
    made = store(storage, work, local, kind="model", key="k", step=7, attempt="0123abcd", curve=curve)
    assert stored(storage, work, "checkpoint", "k") == []
    assert stored(storage, work, "model", "other") == []
    (found,) = stored(storage, work, "model", "k")
    assert found == made
    restore(storage, work, found, tmp_path / "back")
    for path in local.rglob("*"):
        if path.is_file():
            assert (tmp_path / "back" / path.relative_to(local)).read_bytes() == path.read_bytes()
    sweep_work(storage, work, OWN_WORK)
    assert storage.list_files(work) == []


def test_the_newest_two_are_kept_and_others_are_left_alone(
    storage: Storage, root: str, tmp_path: Path
) -> None:
    work, local = join(root, "work"), local_folder(tmp_path / "local")
    for step in (2, 10, 4):
        keep(storage, work, local, step)
    keep(storage, work, local, 3, key="another")
    storage.write(join(work, "checkpoint-mine.json"), b"{}")
    storage.write(join(work, "checkpoint-00000099-00000000.json"), b"no marker")
    remove_older(storage, work, "k")
    assert [folder.step for folder in stored(storage, work, "checkpoint", "k")] == [10, 4]
    names = {info.uri.rpartition("/work/")[2] for info in storage.list_files(work)}
    assert not [name for name in names if name.startswith("checkpoint-00000002")]
    assert len(stored(storage, work, "checkpoint", "another")) == 1
    sweep_work(storage, work, OWN_WORK)
    assert [info.uri.rpartition("/")[2] for info in storage.list_files(work)] == ["checkpoint-mine.json"]


@pytest.mark.parametrize("damage", ["missing", "shorter", "other"])
def test_a_damaged_one_is_not_taken(storage: Storage, tmp_path: Path, damage: str) -> None:
    work = str(tmp_path / "work")
    made = keep(storage, work, local_folder(tmp_path / "local"), 5)
    piece = next(p for file in made.files if file.bytes == 25 for p in made.pieces(work, file)[1:2])
    path = Path(piece.uri)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "shorter" else b"0123456789")
    with pytest.raises(StorageError, match="what was stored"):
        restore(storage, work, made, tmp_path / "back")


def test_a_long_curve_keeps_its_mean_and_its_end() -> None:
    history = [TrainStep(step, float(step), 1.0) for step in range(1, 4 * CURVE_POINTS + 1)]
    short = thinned(history)
    assert len(short) == CURVE_POINTS
    assert short[-1].step == history[-1].step
    assert sum(point.loss for point in short) / len(short) == pytest.approx(
        sum(point.loss for point in history) / len(history)
    )
    assert thinned(short) == short
