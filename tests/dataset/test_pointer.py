"""A pointer leads to one data set or another, and is moved in one step."""

import threading

import pytest

from bge_ray.dataset.pointer import NAME, Pointer, Seen, follow, move, read_pointer, refuse_pointer
from bge_ray.errors import DatasetMismatchError, SettingsError, TakenOverError
from bge_ray.storage.objects import Storage, join

STORAGE = Storage(20)


def test_who_reads_finds_the_one_or_the_other(root: str) -> None:
    assert follow(STORAGE, root) == root
    refuse_pointer(STORAGE, root, "output.uri")
    move(STORAGE, root, read_pointer(STORAGE, root), Pointer("s3://a", None, "now"))
    assert follow(STORAGE, root) == "s3://a"
    seen = read_pointer(STORAGE, root)
    move(STORAGE, root, seen, Pointer("s3://b", "s3://a", "later"))
    assert read_pointer(STORAGE, root).pointer == Pointer("s3://b", "s3://a", "later")
    with pytest.raises(SettingsError, match=r"output.uri .* is a pointer, which leads to s3://b"):
        refuse_pointer(STORAGE, root, "output.uri")
    # By what was seen before that move nobody moves it.
    with pytest.raises(TakenOverError, match="meanwhile"):
        move(STORAGE, root, seen, Pointer("s3://c", "s3://a", "late"))
    with pytest.raises(TakenOverError, match="meanwhile"):
        move(STORAGE, root, Seen(None, ""), Pointer("s3://c", None, "late"))
    assert follow(STORAGE, root) == "s3://b"


def test_of_many_that_move_it_at_once_one_does(root: str) -> None:
    move(STORAGE, root, Seen(None, ""), Pointer("s3://0", None, "now"))
    seen = read_pointer(STORAGE, root)
    moved, barrier = [], threading.Barrier(6)

    def one(number: int) -> None:
        barrier.wait()
        try:
            move(STORAGE, root, seen, Pointer(f"s3://{number}", "s3://0", "then"))
        except TakenOverError:
            return
        moved.append(f"s3://{number}")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [follow(STORAGE, root)] == moved


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{", "no pointer of ours"),
        (b'{"dataset": "s3://a", "before": null, "moved_at": "x", "format_version": 2}', "version 2"),
    ],
)
def test_what_is_no_pointer_is_named(root: str, data: bytes, said: str) -> None:
    STORAGE.write(join(root, NAME), data)
    with pytest.raises(DatasetMismatchError, match=said):
        follow(STORAGE, root)
