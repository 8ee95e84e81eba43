"""Whose the folder of an index is: what is foreign stays, what was ours goes in its time."""

import json
from pathlib import Path

import pytest

from bge_ray.errors import DatasetMismatchError, IndexBuildError, OutputCollisionError
from bge_ray.pipeline.index.job import build_index
from bge_ray.pipeline.index.published import index_files, read_index
from bge_ray.settings.sections import Settings, parse_settings
from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import open_folder
from tests.support.vectors import VectorDataset, clustered, make_dataset

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

STORAGE = Storage(20)
DIM = 16
FOREIGN = b"not written by any job"
FACTORY = "IVF8,SQ8"


def settings_for(root: Path, *overrides: str) -> Settings:
    keys = [f"output.uri={root}", "output.grace_s=0", f"index.factory={FACTORY}", "index.num_queries=20"]
    return parse_settings(None, [*keys, *overrides])


def below(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def grow(made: VectorDataset, object_no: int) -> None:
    made.put(object_no, clustered(300, DIM, seed=object_no))
    made.publish()


def test_foreign_files_stay_and_what_the_new_index_does_not_need_goes(tmp_path: Path) -> None:
    made = make_dataset(str(tmp_path), [600, 500], DIM)
    index = tmp_path / "index"
    digest = "0123456789abcdef"
    theirs = {
        "theirs.parquet",
        "notes/index.faiss",
        "parts/theirs.part",
        f"parts/{digest}.part.bak",
        f"trained/{digest}.txt",
        f"{digest}/theirs.faiss",
        f"backup/{digest}/index.faiss",
    }
    ours = {f"parts/{digest}.part", f"trained/{digest}.faiss", f"{digest}/piece-0000000-0000004"}
    for name in (*theirs, *ours):
        (index / name).parent.mkdir(parents=True, exist_ok=True)
        (index / name).write_bytes(FOREIGN)
    first = build_index(settings_for(tmp_path))
    assert not ours & set(below(index))
    grow(made, 2)
    second = build_index(settings_for(tmp_path))
    assert second.ntotal == 1400
    fixed = {"index.json", "training.json", "report.json", "report.html", "_bge_ray.json"}
    live = {second.training.path, *second.parts, *(file.path for file in second.files)}
    left = below(index)
    sizes = {name for name in left if name.endswith(".sizes")}
    assert set(left) == theirs | fixed | live | sizes
    assert {left[name] for name in theirs} == {FOREIGN}
    assert not {file.path for file in first.files} & set(left)
    assert [p for p in index.rglob("*") if p.is_dir() and not any(p.iterdir())] == []


def test_the_files_of_the_index_before_stay_for_those_who_read_it(tmp_path: Path) -> None:
    made = make_dataset(str(tmp_path), [600, 500], DIM)
    patient = settings_for(tmp_path, "output.grace_s=3600")
    first = build_index(patient)
    grow(made, 2)
    second = build_index(patient)
    for description in (first, second):
        for file in index_files(str(tmp_path), description):
            assert Path(file.path).stat().st_size == file.bytes
    assert build_index(patient) == second
    # Nothing to build, but their time is over.
    assert build_index(settings_for(tmp_path)) == second
    assert not [f for f in index_files(str(tmp_path), first) if Path(f.path).exists()]
    assert all(Path(file.path).exists() for file in index_files(str(tmp_path), second))


@pytest.mark.parametrize(
    "name", ["index.json", "training.json", "report.json", "report.html", "_bge_ray.json"]
)
@pytest.mark.parametrize("content", [FOREIGN, b"{}", b'{"files": []}'])
def test_a_foreign_file_at_a_name_of_ours_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, content: bytes
) -> None:
    make_dataset(str(tmp_path), [400], DIM)
    index = tmp_path / "index"
    index.mkdir()
    (index / name).write_bytes(content)
    with pytest.raises(OutputCollisionError) as caught:
        build_index(settings_for(tmp_path))
    assert caught.value.exit_code == 2
    assert str(index / name) in str(caught.value)
    assert below(index) == {name: content}


@pytest.mark.slow
def test_an_index_that_was_edited_by_hand_is_nobodys_to_replace(tmp_path: Path) -> None:
    made = make_dataset(str(tmp_path), [600], DIM)
    build_index(settings_for(tmp_path))
    path = tmp_path / "index/index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recall_target": 0.5}))
    edited = below(tmp_path / "index")
    grow(made, 1)
    with pytest.raises(OutputCollisionError, match="or was changed since; move it away"):
        build_index(settings_for(tmp_path))
    assert below(tmp_path / "index") == edited
    path.unlink()
    assert build_index(settings_for(tmp_path)).ntotal == 900


def test_an_index_of_another_format_is_built_anew_and_a_foreign_one_refused(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), [400], DIM)
    path = tmp_path / "index/index.json"
    path.parent.mkdir()
    older = json.dumps({"format_version": 1, "nprobe": 4}).encode()
    path.write_bytes(older)
    with pytest.raises(OutputCollisionError, match="was not written by this project"):
        build_index(settings_for(tmp_path))
    assert set(below(tmp_path / "index")) <= {"index.json", "lease.json"}
    path.unlink()
    first = build_index(settings_for(tmp_path))
    open_folder(STORAGE, str(path.parent), "index", "output.uri").put("index.json", older)
    with pytest.raises(DatasetMismatchError, match=r"is of format 1, .* run index\.py"):
        read_index(STORAGE, str(tmp_path))
    assert build_index(settings_for(tmp_path)).files == first.files


def test_a_build_that_fails_leaves_no_report_of_the_one_before(tmp_path: Path) -> None:
    made = make_dataset(str(tmp_path), [600], DIM)
    first = build_index(settings_for(tmp_path))
    vectors = clustered(300, DIM, seed=5)
    vectors[7] = 0
    made.put(1, vectors)
    made.publish()
    with pytest.raises(IndexBuildError, match="norm 0"):
        build_index(settings_for(tmp_path))
    report = tmp_path / "index/report.json"
    assert json.loads(report.read_text())["complete"] is False
    assert read_index(STORAGE, str(tmp_path)) == first
    # The data set is what it was: so is the index, and it is told of anew.
    made.remove(1)
    made.publish()
    assert build_index(settings_for(tmp_path)) == first
    assert json.loads(report.read_text())["complete"] is True
