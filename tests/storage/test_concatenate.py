"""One object out of several, on a disk and on S3, whole or not at all."""

from collections.abc import Callable

import numpy as np
import pytest
from fsspec.core import url_to_fs
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_ray.errors import StorageError
from bge_ray.storage.concatenate import (
    MIN_PART_BYTES,
    Piece,
    concatenate,
    plan_parts,
    remove_unfinished,
    write_large,
)
from bge_ray.storage.objects import Storage, join
from tests.support.proxy import FaultyProxy

pytestmark = pytest.mark.long

SMALL, LARGE = 1000, MIN_PART_BYTES + 12_345


def make_pieces(storage: Storage, root: str, sizes: list[int]) -> tuple[list[Piece], bytes]:
    rng = np.random.default_rng(0)
    pieces, whole = [], b""
    for number, size in enumerate(sizes):
        data = rng.bytes(size)
        pieces.append(Piece(join(root, f"piece {number}+ü.bin"), size))
        storage.write(pieces[-1].uri, data)
        whole += data
    return pieces, whole


@pytest.mark.parametrize(
    "sizes",
    [
        [SMALL],
        [0, SMALL, 0],
        [SMALL, LARGE],  # a header, then one range
        [SMALL, LARGE, LARGE, SMALL],
        [LARGE, SMALL, SMALL, LARGE, SMALL],
        [SMALL] * 30,
    ],
)
def test_the_pieces_follow_each_other(storage: Storage, root: str, sizes: list[int]) -> None:
    pieces, whole = make_pieces(storage, root, sizes)
    uri = join(root, "sub", "whole.bin")
    concatenate(storage, pieces, uri)
    assert storage.read(uri) == whole
    concatenate(storage, pieces[::-1], uri)  # replaces
    assert len(storage.read(uri)) == len(whole)


def test_a_missing_or_short_piece_leaves_what_was_there(storage: Storage, root: str) -> None:
    pieces, _ = make_pieces(storage, root, [LARGE, LARGE])
    uri = join(root, "whole.bin")
    storage.write(uri, b"old")
    with pytest.raises(StorageError, match=r"missing\.bin"):
        concatenate(storage, [*pieces, Piece(join(root, "missing.bin"), LARGE)], uri)
    assert storage.read(uri) == b"old"
    assert remove_unfinished(storage, root) == 0  # nothing was left behind


def test_large_objects_arrive_whole(storage: Storage, root: str) -> None:
    data = np.random.default_rng(1).bytes(40_000_000)
    uri = join(root, "large.bin")
    write_large(storage, uri, bytearray(data))
    assert storage.read(uri) == data
    write_large(storage, uri, b"small")
    assert storage.read(uri) == b"small"


def test_uploads_of_killed_processes_are_given_up(storage: Storage, bucket: str) -> None:
    fs, path = url_to_fs(f"{bucket}/index/x.bin")
    _, other = url_to_fs(f"{bucket}/index2/x.bin")
    for name in (path, other):
        where, _, key = name.partition("/")
        fs.call_s3("create_multipart_upload", Bucket=where, Key=key)
    assert remove_unfinished(storage, f"{bucket}/index") == 1
    assert remove_unfinished(storage, f"{bucket}/index") == 0
    assert remove_unfinished(storage, f"{bucket}/index2") == 1


def test_a_faulty_line_is_survived(storage: Storage, bucket: str, faulty: Callable[..., FaultyProxy]) -> None:
    pieces, whole = make_pieces(storage, bucket, [SMALL, LARGE, LARGE])
    seen: dict[str, int] = {}

    def fault(_: int, method: str, path: str) -> str:
        seen[method + path] = seen.get(method + path, 0) + 1
        if seen[method + path] == 1:
            return "503"
        # The server completes the upload, and the answer is lost.
        completes = method == "POST" and "uploadId" in path
        return "mute" if completes and seen[method + path] == 2 else ""

    proxy = faulty(fault)
    concatenate(storage, pieces, f"{bucket}/whole.bin")
    assert proxy.faults > 4
    assert storage.read(f"{bucket}/whole.bin") == whole


@given(
    sizes=st.lists(st.integers(0, 60), max_size=12),
    least=st.integers(1, 10),
    most=st.integers(20, 40),
)
@settings(deadline=None, derandomize=True)
def test_parts_cover_all_bytes_once_and_keep_the_limits(sizes: list[int], least: int, most: int) -> None:
    parts = plan_parts(sizes, least, most)
    covered = [(s.piece, byte) for part in parts for s in part for byte in range(s.start, s.stop)]
    assert covered == [(piece, byte) for piece, size in enumerate(sizes) for byte in range(size)]
    lengths = [sum(s.stop - s.start for s in part) for part in parts]
    assert all(least <= length <= most for length in lengths[:-1])
    assert all(0 < length <= most for length in lengths)
    # What is not copied on the server is small.
    assert all(len(part) == 1 or length < 2 * least for part, length in zip(parts, lengths, strict=True))
