"""Retirement: what is dead long enough goes, what is needed again stays, and all foreign files do."""

import json
import os
from pathlib import Path

import pytest

from bge_ray.errors import OutputCollisionError, TakenOverError
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.sweep import RETIRED, Swept, remove_empty_folders, retire
from tests.storage.doubles import Died, dying, once


def there(storage: Storage, root: str) -> set[str]:
    return {info.uri.partition(f"{root.rpartition('/')[2]}/")[2] for info in storage.list_files(root)}


def write(storage: Storage, root: str, *names: str) -> None:
    for name in names:
        storage.write(join(root, name), name.encode())


def test_dead_files_go_after_their_grace(storage: Storage, root: str) -> None:
    write(storage, root, "a/1", "a/2", "b", "live")
    assert retire(storage, root, ["a/1", "a/2"], 60, now=1000) == Swept(0, 2)
    assert retire(storage, root, ["a/1", "a/2", "b"], 60, now=1059.9) == Swept(0, 3)
    assert there(storage, root) == {"a/1", "a/2", "b", "live"}
    assert retire(storage, root, ["a/1", "a/2", "b"], 60, now=1060) == Swept(2, 1)
    assert there(storage, root) == {"b", "live"}
    assert retire(storage, root, ["b"], 60, now=1119.9) == Swept(1, 0)
    assert there(storage, root) == {"live"}
    assert storage.info(join(root, RETIRED)) is None, "no list is kept of nothing"
    assert retire(storage, root, [], 60, now=2000) == Swept(0, 0)


def test_what_is_needed_again_begins_anew(storage: Storage, root: str) -> None:
    write(storage, root, "a", "b")
    retire(storage, root, ["a", "b"], 60, now=0)
    assert retire(storage, root, ["b"], 60, now=30) == Swept(0, 1)
    assert retire(storage, root, ["a", "b"], 60, now=70) == Swept(1, 1)
    assert there(storage, root) == {"a"}
    assert retire(storage, root, ["a"], 60, now=129) == Swept(0, 1)
    assert retire(storage, root, ["a"], 60, now=130) == Swept(1, 0)


def test_without_grace_they_go_at_once(storage: Storage, root: str) -> None:
    write(storage, root, "a", "b")
    assert retire(storage, root, iter(["a", "gone"]), 0, now=5) == Swept(2, 0)
    assert there(storage, root) == {"b"}


def test_a_clock_that_was_ahead_keeps_nothing_for_ever(storage: Storage, root: str) -> None:
    write(storage, root, "a")
    retire(storage, root, ["a"], 60, now=1e12)
    assert retire(storage, root, ["a"], 60, now=100) == Swept(0, 1)
    assert retire(storage, root, ["a"], 60, now=160) == Swept(1, 0)


def test_a_death_between_any_two_requests_costs_a_wait_at_most(storage: Storage, root: str) -> None:
    for at in range(12):
        write(storage, root, "due", "fresh", "live")
        retire(storage, root, ["due"], 60, now=0)
        try:
            retire(dying(at), root, ["due", "fresh"], 60, now=60)
        except Died:
            assert {"fresh", "live"} <= there(storage, root)
        left = sorted(there(storage, root) - {"live"})
        retire(storage, root, left, 60, now=200)
        retire(storage, root, left, 60, now=260)
        assert there(storage, root) == {"live"}


def test_of_two_sweepers_one_gives_way(storage: Storage, root: str) -> None:
    """An old run that comes back removes nothing by a list that a newer run has changed."""
    write(storage, root, "a", "b")
    retire(storage, root, ["a"], 60, now=0)
    for at in range(2, 12):
        hooked = once(at, lambda: retire(storage, root, ["b"], 60, now=60))
        with pytest.raises(TakenOverError, match="another run"):
            retire(hooked, root, ["a"], 60, now=60)
        assert there(storage, root) == {"a", "b"}
        if hooked.counted[at].startswith(("replace", "delete")):
            break
        retire(storage, root, ["a"], 60, now=0)
    else:
        pytest.fail("the list was never written")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"since": {"a": 0}}', b'{"since": 1, "of": "bge-ray"}']
)
def test_a_foreign_file_named_like_the_list_stays(storage: Storage, root: str, content: bytes) -> None:
    write(storage, root, "a")
    storage.write(join(root, RETIRED), content)
    if b'"a": 0' in content:
        content = json.dumps({"since": {"a": 0}, "of": "somebody"}).encode()
        storage.write(join(root, RETIRED), content)
    with pytest.raises(OutputCollisionError, match="move it away"):
        retire(storage, root, ["a"], 0, now=0)
    assert storage.read(join(root, RETIRED)) == content
    assert there(storage, root) == {"a"}


def test_many_files_go(storage: Storage, root: str) -> None:
    names = [f"d/{i:03d}" for i in range(50)]
    write(storage, root, *names)
    assert retire(storage, root, names, 0, now=0) == Swept(50, 0)
    assert there(storage, root) == set()


def test_only_empty_folders_go(storage: Storage, tmp_path: Path) -> None:
    outer = tmp_path / "out"
    work = outer / "work"
    for name in ("a/b/c", "d", "e/f"):
        (work / name).mkdir(parents=True)
    (work / "e" / "kept.txt").write_bytes(b"")
    (work / "d" / ".hidden").write_bytes(b"")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (work / "g").mkdir()
    (work / "g" / "link").symlink_to(elsewhere, target_is_directory=True)
    assert remove_empty_folders(storage, str(work)) == 4
    assert sorted(str(p.relative_to(work)) for p in work.rglob("*")) == [
        "d",
        "d/.hidden",
        "e",
        "e/kept.txt",
        "g",
        "g/link",
    ]
    assert elsewhere.is_dir()
    for path in (work / "d" / ".hidden", work / "e" / "kept.txt", work / "g" / "link"):
        path.unlink()
    assert remove_empty_folders(storage, str(work)) == 4
    assert os.listdir(outer) == [], "the folder itself went, and its parent stays"
    assert remove_empty_folders(storage, str(work)) == 0


def test_a_linked_folder_and_a_bucket_are_left_alone(storage: Storage, tmp_path: Path, bucket: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert remove_empty_folders(storage, str(tmp_path / "link")) == 0
    assert (tmp_path / "real").is_dir()
    storage.write(join(bucket, "a"), b"")
    assert remove_empty_folders(storage, bucket) == 0
    assert there(storage, bucket) == {"a"}
