"""Bytes in and out of any fsspec URI: whole-object writes, exclusive creation, ranged reads, listings.

Every write is all or nothing: an object appears under its final name complete or not at all. An
operation that fails for a passing reason (a dropped connection, a 503, a restarting server) is
repeated until `Storage.timeout_s` is over; one that can never succeed (403, no such bucket, a
full disk) fails at once. Credentials come from the environment in whichever process does the
work, so a `Storage` can be sent to another process without carrying a secret.
"""

import errno
import io
import os
import posixpath
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import tenacity
from fsspec.core import url_to_fs

from bge_ray.errors import StorageError

T = TypeVar("T")

# A dot in front keeps temporary files out of every listing and glob of ours.
TEMPORARY_SUFFIX = ".bge-ray-tmp"

_PERMANENT_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.EFBIG}
_PERMANENT_TYPES = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    io.UnsupportedOperation,
)
# Client libraries raise these outside OSError while a server restarts; named, not imported, because
# which library is there depends on the protocol.
_TRANSIENT_NAMES = {
    "ClientError",
    "ClientConnectorError",
    "ClientPayloadError",
    "ClosedIncompleteRead",
    "ConnectionClosedError",
    "ConnectTimeoutError",
    "EndpointConnectionError",
    "HTTPClientError",
    "HttpError",
    "IncompleteReadError",
    "ReadTimeoutError",
    "ResponseParserError",
    "ResponseStreamingError",
    "ServerDisconnectedError",
    "ServiceRequestError",
    "ServiceResponseError",
}


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing; ``etag`` changes whenever the content does."""

    uri: str
    size: int
    etag: str


@dataclass(frozen=True)
class Storage:
    """Storage operations that share one retry limit; holds no connection and no secret."""

    timeout_s: float = 120.0

    def read(self, uri: str) -> bytes:
        """Return the whole object.

        Raises:
            StorageError: it is missing, forbidden, or unreachable until the time limit.
        """
        return self._retry("read", uri, lambda fs, path: bytes(fs.cat_file(path)))

    def read_optional(self, uri: str) -> bytes | None:
        """Return the whole object, or None if there is none of that name."""

        def cat(fs: Any, path: str) -> bytes | None:
            try:
                return bytes(fs.cat_file(path))
            except FileNotFoundError:
                return None

        return self._retry("read", uri, cat)

    def read_range(self, uri: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of the object; fewer where it ends earlier."""
        return self._retry("read", uri, lambda fs, path: bytes(fs.cat_file(path, start=start, end=stop)))

    def open(self, uri: str, size: int) -> "RangeFile":
        """Return a seekable binary file over an object of ``size`` bytes, read by retried ranges."""
        return RangeFile(self, uri, size)

    def write(self, uri: str, data: bytes) -> None:
        """Write the object in one step, replacing what has that name."""

        def put(fs: Any, path: str) -> None:
            if is_local(fs):
                _write_local(Path(path), data, exclusive=False)
            else:
                fs.pipe_file(path, data)

        self._retry("write", uri, put)

    def create(self, uri: str, data: bytes) -> bool:
        """Write the object unless one of that name exists.

        Returns:
            True if the object now holds ``data``; also when it already did, which is how a retry
            after a lost answer looks. False if another content was there first.
        """

        def put(fs: Any, path: str) -> bool:
            try:
                if is_local(fs):
                    _write_local(Path(path), data, exclusive=True)
                else:
                    fs.pipe_file(path, data, mode="create")
            except OSError as error:
                if not _says_exists(error):
                    raise
                return bytes(fs.cat_file(path)) == data
            return True

        return self._retry("create", uri, put)

    def info(self, uri: str) -> ObjectInfo | None:
        """Return size and etag of one object, or None if there is none of that name."""

        def head(fs: Any, path: str) -> ObjectInfo | None:
            fs.invalidate_cache()
            try:
                return _object_info(fs, fs.info(path))
            except FileNotFoundError:
                return None

        return self._retry("look at", uri, head)

    def list_files(self, uri: str) -> list[ObjectInfo]:
        """Return the objects of a file, folder (recursively) or glob, sorted by URI; hidden ones left out."""

        def listing(fs: Any, path: str) -> list[ObjectInfo]:
            fs.invalidate_cache()
            if any(c in path for c in "*?["):
                found = fs.glob(path, detail=True)
            else:
                found = fs.find(path, detail=True)
            root = path.rstrip("/")
            return sorted(
                (
                    _object_info(fs, i)
                    for name, i in found.items()
                    if i["type"] == "file" and not _hidden(name, root)
                ),
                key=lambda o: o.uri,
            )

        return self._retry("list", uri, listing)

    def delete(self, uris: Iterable[str]) -> None:
        """Remove objects; one that is already gone counts as removed."""
        for uri in uris:

            def remove(fs: Any, path: str) -> None:
                try:
                    fs.rm_file(path)
                except FileNotFoundError:
                    return

            self._retry("delete", uri, remove)

    def _retry(self, verb: str, uri: str, operation: Callable[[Any, str], T]) -> T:
        try:
            fs, path = url_to_fs(uri)
            for attempt in tenacity.Retrying(
                stop=tenacity.stop_after_delay(self.timeout_s),
                wait=tenacity.wait_random_exponential(multiplier=0.2, max=8),
                retry=tenacity.retry_if_exception(_is_transient),
                reraise=True,
            ):
                with attempt:
                    return operation(fs, path)
        except (OSError, ImportError, ValueError) as error:
            raise StorageError(_explain(verb, uri, error)) from error
        except Exception as error:
            if _is_transient(error) or type(error).__name__ in (
                "NoCredentialsError",
                "PartialCredentialsError",
            ):
                raise StorageError(_explain(verb, uri, error)) from error
            raise
        raise AssertionError("unreachable: Retrying either returns or raises")


class RangeFile(io.RawIOBase):
    """A read-only seekable file over one object; each read is one ranged request with retries."""

    def __init__(self, storage: Storage, uri: str, size: int) -> None:
        super().__init__()
        self._storage, self._uri, self._size, self._at = storage, uri, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._size, self._at + size)
        if stop <= self._at:
            return b""
        data = self._storage.read_range(self._uri, self._at, stop)
        if len(data) != stop - self._at:
            raise StorageError(
                f"{self._uri}: {self._size} bytes were listed, but it ends at byte {self._at + len(data)}"
            )
        self._at = stop
        return data

    def readall(self) -> bytes:
        return self.read(-1)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def join(root: str, *parts: str) -> str:
    """Return the URI of a name below a folder URI."""
    return posixpath.join(root.rstrip("/") if root.rstrip("/") else root, *parts)


def is_local(fs: Any) -> bool:
    """Tell whether a file system is this machine's own."""
    return isinstance(fs, fsspec.implementations.local.LocalFileSystem)


def _hidden(name: str, root: str) -> bool:
    below = name[len(root) :] if name.startswith(root) else posixpath.basename(name)
    return any(part.startswith((".", "_SUCCESS")) for part in below.split("/"))


def _object_info(fs: Any, info: dict[str, Any]) -> ObjectInfo:
    # Local files have no etag; modification time and inode change with every whole-file write.
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("generation")
    if etag is None:
        etag = f"{info.get('mtime', info.get('last_modified', ''))}-{info.get('ino', '')}"
    return ObjectInfo(
        uri=fs.unstrip_protocol(info["name"]), size=int(info["size"]), etag=str(etag).strip('"')
    )


def _write_local(path: Path, data: bytes, *, exclusive: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            os.link(temporary, path)  # fails if the name is taken, unlike a rename
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power cut, where the system lets a folder be synced."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _says_exists(error: OSError) -> bool:
    # s3fs turns HTTP 412 into OSError(EINVAL, "... pre-conditions ..."), not into FileExistsError.
    text = str(error).lower()
    return isinstance(error, FileExistsError) or "pre-condition" in text or "preconditionfailed" in text


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, _PERMANENT_TYPES) and error.errno not in _PERMANENT_ERRNOS
    return bool(_TRANSIENT_NAMES & {t.__name__ for t in type(error).__mro__})


def _explain(verb: str, uri: str, error: BaseException) -> str:
    hint = ""
    if isinstance(error, FileNotFoundError):
        hint = " (no such object, folder or bucket)"
    elif isinstance(error, PermissionError):
        hint = " (access refused: check the credentials in the environment and the bucket policy)"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = " (no space left; nothing half-written was kept)"
    elif type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        hint = " (no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role)"
    return f"cannot {verb} {uri}: {type(error).__name__}: {error}{hint}"
