"""The client for ranged reads gives the bytes, or leaves the matter to s3fs, whose errors are told."""

import os

import fsspec
import pytest
from fsspec.core import url_to_fs

from bge_ray.errors import StorageAccessError, StorageError
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ranges import read_s3_range


@pytest.mark.parametrize("name", ["a.jsonl", "with space", "a+b=c%20d#e", "ünïcode/文", "a?b*[c]"])
def test_any_key_is_read_by_it(storage: Storage, bucket: str, name: str) -> None:
    uri, data = join(bucket, name), os.urandom(1000)
    storage.write(uri, data)
    fs, path = url_to_fs(uri)
    assert read_s3_range(fs, path, 0, 1000) == data
    assert read_s3_range(fs, path, 990, 2000) == data[990:]
    assert storage.read_range(uri, 3, 900) == data[3:900]


def test_keys_that_it_would_take_for_others_are_left_to_the_other(storage: Storage, bucket: str) -> None:
    storage.write(join(bucket, "a/b"), b"one")
    fs, path = url_to_fs(join(bucket, "a/b"))
    assert read_s3_range(fs, path, 0, 3) == b"one"
    for other in (path.replace("a/b", "a//b"), f"{path}/"):
        assert read_s3_range(fs, other, 0, 3) is None


def test_what_it_cannot_read_is_left_to_the_other(storage: Storage, bucket: str) -> None:
    uri = join(bucket, "a")
    storage.write(uri, b"0123456789")
    fs, path = url_to_fs(uri)
    assert read_s3_range(fs, path, 10, 20) is None
    assert storage.read_range(uri, 10, 20) == b""
    assert read_s3_range(fs, f"{path}-missing", 0, 1) is None
    with pytest.raises(StorageError, match="no such object"):
        storage.read_range(f"{uri}-missing", 0, 1)


def test_other_keys_are_not_overlooked(
    storage: Storage, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = join(bucket, "a")
    storage.write(uri, b"0123456789")
    assert storage.read_range(uri, 0, 2) == b"01"
    monkeypatch.setitem(fsspec.config.conf, "s3", {"key": "nobody", "secret": "wrong"})
    with pytest.raises(StorageAccessError, match="check the credentials"):
        storage.read_range(uri, 0, 2)
