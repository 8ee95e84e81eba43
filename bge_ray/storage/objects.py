"""Bytes in and out of any fsspec URI: whole-object writes, exclusive creation, ranged reads, listings.

Every write is all or nothing: an object appears under its final name complete or not at all. An
operation that fails for a passing reason (a dropped connection, a 503, a restarting server) is
repeated until `Storage.timeout_s` is over; one that can never succeed (403, no such bucket, a
full disk) fails at once. Credentials come from the environment in whichever process does the
work, so a `Storage` can be sent to another process without carrying a secret.
"""

import contextlib
import errno
import io
import itertools
import os
import posixpath
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import tenacity
from fsspec.core import url_to_fs

from bge_ray.errors import StorageAccessError, StorageError
from bge_ray.records.plan import NO_VERSION
from bge_ray.storage.links import ThroughLinks
from bge_ray.storage.ranges import read_s3_range

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")

# A dot in front keeps temporary files out of every listing and glob of ours.
TEMPORARY_SUFFIX = ".bge-ray-tmp"

# Of the file that is locked while one of that name is compared and replaced.
LOCK_SUFFIX = ".bge-ray-lock"

# What stores call that which changes with the content, and the time of the last write where none does.
_ETAG_KEYS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "Content-MD5", "Digest")
_TIME_KEYS = ("mtime", "last_modified", "LastModified", "Last-Modified", "created")
FOLDER_ENDINGS = ("/", "_$folder$")
# Web servers are asked about so many files at once.
PARALLEL_LOOKS = 16

# A temporary file older than this belongs to a process that was killed.
TEMPORARY_MAX_AGE_S = 3600.0
# s3fs cuts larger writes into parts, which not every server creates exclusively; S3 takes 5 GB at once.
S3_PART_BYTES = 5 << 29

_PERMANENT_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EFBIG,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.ELOOP,
}
# Space may be there for the next run.
_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
_NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
# Codes in S3 answers that a mere Python exception type hides: the first set passes, the second never does.
_TRANSIENT_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "RequestTimeout",
    "XAmzContentSHA256Mismatch",
}
_PERMANENT_CODES = {"301", "PermanentRedirect"}
# The next run starts with the credentials of its own time.
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
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
_CLIENT_MODULES = {"adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "s3fs"}
_CREDENTIAL_NAMES = {
    "CredentialRetrievalError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "TokenRetrievalError",
}


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing; ``etag`` changes whenever it is written.

    ``version`` is what every node that sees the same content sees of it. On a disk that is the time alone:
    the inode, by which two writes within a tick of the clock are told apart, is another one through a mount.
    Both are ``NO_VERSION`` where the store tells nothing of the kind.
    """

    uri: str
    size: int
    etag: str
    version: str

    def is_same(self, size: int, version: str) -> bool:
        """Tell whether this is the content of which a size and a version (or an etag) were noted."""
        return self.size == size and version in (self.version, self.etag)


@dataclass(frozen=True)
class Storage:
    """Storage operations that share one retry limit; holds no connection and no secret."""

    timeout_s: float = 120.0

    def read(self, uri: str) -> bytes:
        """Return the whole object.

        Raises:
            StorageError: it is missing, forbidden, or unreachable until the time limit.
        """
        return self.attempt("read", uri, _cat)

    def read_optional(self, uri: str) -> bytes | None:
        """Return the whole object, or None if there is none of that name."""

        def cat(fs: Any, path: str) -> bytes | None:
            try:
                return _cat(fs, path)
            except FileNotFoundError:
                return None

        return self.attempt("read", uri, cat)

    def read_range(self, uri: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of the object; fewer where it ends earlier."""
        if stop <= start:
            return b""

        def cat(fs: Any, path: str) -> bytes:
            if "s3" in _protocols(fs) and (found := read_s3_range(fs, path, start, stop)) is not None:
                return found
            try:
                data = bytes(fs.cat_file(path, start=start, end=stop))
            except OSError as error:
                if _server_code(error) in ("InvalidRange", "416"):
                    return b""
                raise
            # A web server that knows no ranges sends everything.
            return data if len(data) <= stop - start else data[start:stop]

        return self.attempt("read", uri, cat)

    def open(self, uri: str, size: int) -> "RangeFile":
        """Return a seekable binary file over the first ``size`` bytes of an object."""
        return RangeFile(self, uri, size)

    def write(self, uri: str, data: bytes) -> None:
        """Write the object in one step, replacing what has that name."""

        def put(fs: Any, path: str) -> None:
            if is_local(fs):
                _write_local(Path(path), data, exclusive=False)
            else:
                fs.pipe_file(path, data, **_one_request(fs, chunksize=S3_PART_BYTES))

        self.attempt("write", uri, put)

    def create(self, uri: str, data: bytes) -> bool:
        """Write the object unless one of that name exists.

        Returns:
            True if the object now holds ``data``; also when it already did, which is how a retry
            after a lost answer looks. False if another content was there first.
        """

        def put(fs: Any, path: str) -> bool:
            while True:
                try:
                    if is_local(fs):
                        _write_local(Path(path), data, exclusive=True)
                    else:
                        fs.pipe_file(path, data, **_exclusive(fs))
                except Exception as error:
                    if not _says_exists(error):
                        raise
                else:
                    return True
                try:
                    return _cat(fs, path) == data
                except FileNotFoundError:
                    continue  # removed since: the name is free again

        return self.attempt("create", uri, put)

    def replace(self, uri: str, data: bytes, etag: str) -> bool:
        """Write the object if it is still the one that had an etag.

        S3 compares by itself, and a local disk is compared under a lock that all who come this way
        respect. Elsewhere, and where a server knows no conditions, it is looked at just before.

        Args:
            uri: an object that is there.
            data: what it is to hold.
            etag: of `info`.

        Returns:
            True if the object now holds ``data``. False if it was replaced or removed since.
        """

        def put(fs: Any, path: str) -> bool:
            def act(condition: dict[str, str]) -> None:
                if is_local(fs):
                    _write_local(Path(path), data, exclusive=False)
                else:
                    fs.pipe_file(path, data, **_one_request(fs, chunksize=S3_PART_BYTES), **condition)

            # The answer to a request that succeeded may be lost, and the retry finds what it wrote itself.
            return _if_unchanged(fs, path, etag, act) or _holds(fs, path, data)

        return self.attempt("replace", uri, put)

    def delete_seen(self, uri: str, etag: str) -> bool:
        """Remove the object if it is still the one that had an etag, told apart as in `replace`.

        Returns:
            True if nothing of that name is left. False if another object has the name since.
        """

        def remove(fs: Any, path: str) -> bool:
            def act(condition: dict[str, str]) -> None:
                if condition:
                    bucket, _, key = path.partition("/")
                    fs.call_s3("delete_object", Bucket=bucket, Key=key, **condition)
                else:
                    fs.rm_file(path)

            return _if_unchanged(fs, path, etag, act) or _etag(fs, path) is None

        return self.attempt("delete", uri, remove)

    def info(self, uri: str) -> ObjectInfo | None:
        """Return size and etag of one object, or None if there is none of that name."""

        def head(fs: Any, path: str) -> ObjectInfo | None:
            try:
                return _object_info(fs, fs.info(path))
            except FileNotFoundError:
                return None

        return self.attempt("look at", uri, head)

    def list_files(self, uri: str) -> list[ObjectInfo]:
        """Return the objects of a file, folder (recursively) or glob, sorted by URI; links are followed.

        Hidden ones are left out: below the folder, a name that starts with a dot, or with an
        underscore and holds no ``=``. So Spark's ``_temporary`` and ``_SUCCESS`` are no input, and a
        partition ``_day=1`` is.
        """

        def listing(fs: Any, path: str) -> list[ObjectInfo]:
            fs = ThroughLinks() if is_local(fs) else fs
            found = fs.glob(path, detail=True) if is_glob(path) else {}
            if not found:  # a plain name, or one that holds a bracket or a question mark of its own
                found = fs.find(path, detail=True)
            root = fixed_prefix(path)
            names = [n for n, i in found.items() if not is_hidden(n, root) and not _is_folder(n, i)]
            # A web server's listing has names only.
            bare = [name for name in names if found[name].get("size") is None]
            with ThreadPoolExecutor(PARALLEL_LOOKS) as pool:
                found |= dict(zip(bare, pool.map(fs.info, bare), strict=True))
            return sorted((_object_info(fs, found[name]) for name in names), key=lambda o: o.uri)

        return self.attempt("list", uri, listing)

    def remove_temporaries(self, uri: str) -> int:
        """Remove what killed writers left below a local folder; other stores keep nothing half-written."""

        def remove(fs: Any, path: str) -> int:
            if not is_local(fs):
                return 0
            old = [p for p in Path(path).rglob(f".*{TEMPORARY_SUFFIX}") if _age_s(p) > TEMPORARY_MAX_AGE_S]
            for temporary in old:
                temporary.unlink(missing_ok=True)
            return len(old)

        return self.attempt("clean", uri, remove)

    def delete(self, uris: Iterable[str]) -> None:
        """Remove objects; one that is already gone counts as removed."""
        for uri in uris:

            def remove(fs: Any, path: str) -> None:
                try:
                    fs.rm_file(path)
                except FileNotFoundError:
                    return

            self.attempt("delete", uri, remove)

    def attempt(self, verb: str, uri: str, operation: Callable[[Any, str], T]) -> T:
        """Run an operation until it succeeds, cannot succeed, or has failed for ``timeout_s``.

        Args:
            verb: what it does, for the message.
            uri: the object it is about.
            operation: takes the file system and the object's path in it; must be safe to repeat.

        Raises:
            StorageAccessError: the store refuses, and would again.
            StorageError: it failed in another way.
        """
        try:
            # A cached listing would hide what other processes wrote since.
            fs, path = url_to_fs(uri, use_listings_cache=False)
            for attempt in tenacity.Retrying(
                stop=tenacity.stop_after_delay(self.timeout_s),
                wait=tenacity.wait_random_exponential(multiplier=0.2, max=8),
                retry=tenacity.retry_if_exception(_is_transient),
                reraise=True,
            ):
                with attempt:
                    return operation(fs, path)
        except Exception as error:
            if isinstance(error, OSError | ImportError | ValueError) or _is_of_client(error):
                kind = StorageAccessError if _is_refusal(verb, error) else StorageError
                raise kind(_explain(verb, uri, error)) from error
            raise
        raise AssertionError("unreachable: Retrying either returns or raises")


class RangeFile(io.RawIOBase):
    """A read-only seekable file over one object; each read is one ranged request with retries."""

    def __init__(self, storage: Storage, uri: str, size: int) -> None:
        super().__init__()
        self._storage, self._uri, self._size, self._at = storage, uri, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, which may lie behind the end; costs no request."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Return the next ``size`` bytes, or all that are left.

        Raises:
            StorageError: they cannot be fetched, or the object ends before the size it was opened with.
        """
        stop = self._size if size is None or size < 0 else min(self._size, self._at + size)
        if stop <= self._at:
            return b""
        data = self._storage.read_range(self._uri, self._at, stop)
        if len(data) != stop - self._at:
            raise StorageError(
                f"{self._uri}: {self._size} bytes were expected, of bytes {self._at} to {stop} only "
                f"{len(data)} are there"
            )
        self._at = stop
        return data

    def readall(self) -> bytes:
        """Return all bytes that are left."""
        return self.read(-1)

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there are bytes; return their number."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def join(root: str, *parts: str) -> str:
    """Return the URI of a name below a folder URI."""
    return posixpath.join(root.rstrip("/") or root, *parts)


def is_local(fs: Any) -> bool:
    """Tell whether a file system is this machine's own."""
    return isinstance(fs, fsspec.implementations.local.LocalFileSystem)


def _cat(fs: Any, path: str) -> bytes:
    """Read a whole object in one request: parts read in parallel could be of two versions of it."""
    return bytes(fs.cat_file(path, **_one_request(fs, max_concurrency=1)))


def _one_request(fs: Any, **options: int) -> dict[str, int]:
    """Return options by which s3fs does not cut a request into parts; other clients do not know them."""
    return options if "s3" in _protocols(fs) else {}


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _exclusive(fs: Any) -> dict[str, Any]:
    """Return the options by which a client creates an object only if the name is free."""
    if {"az", "abfs", "abfss"} & _protocols(fs):
        return {"overwrite": False}
    return {"mode": "create", **_one_request(fs, chunksize=S3_PART_BYTES)}


def _if_unchanged(fs: Any, path: str, etag: str, act: Callable[[dict[str, str]], None]) -> bool:
    """Do something to an object unless it has changed; ``act`` takes the condition for an S3 request."""
    if is_local(fs):
        if not Path(path).parent.is_dir():
            return False
        with _locked(Path(path)):
            if _etag(fs, path) != etag:
                return False
            act({})
            return True
    if "s3" in _protocols(fs):
        try:
            act({"IfMatch": f'"{etag}"'})
        except FileNotFoundError:
            return False
        except Exception as error:
            if _says_exists(error):
                return False
            if _server_code(error) != "NotImplemented":
                raise
        else:
            return True
    if _etag(fs, path) != etag:
        return False
    act({})
    return True


def _etag(fs: Any, path: str) -> str | None:
    try:
        return _object_info(fs, fs.info(path)).etag
    except FileNotFoundError:
        return None


def _holds(fs: Any, path: str, data: bytes) -> bool:
    try:
        return fs.info(path).get("size") == len(data) and _cat(fs, path) == data
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes and threads from comparing and replacing a file; the lock dies with its holder.

    Raises:
        BlockingIOError: another one is at it.
    """
    lock = path.with_name(f".{path.name}{LOCK_SUFFIX}")
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _flock(handle)
        # Whoever had the lock has removed it: the next one may have locked a new file of that name.
        if not _is_open_file(lock, handle):
            raise BlockingIOError(errno.EAGAIN, "another process has just replaced it")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _flock(handle: int) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            errno.EAGAIN, "another process is replacing it, or stands still there"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _is_open_file(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def is_glob(path: str) -> bool:
    """Tell whether a path has signs of a pattern; it may still be a plain name that holds some."""
    return any(c in path for c in "*?[")


def fixed_prefix(path: str) -> str:
    """Return a path up to its first part that is a pattern."""
    return "/".join(itertools.takewhile(lambda part: not is_glob(part), path.rstrip("/").split("/")))


def is_hidden(name: str, root: str) -> bool:
    """Tell whether a name below a root is left out of listings, as `Storage.list_files` says."""
    below = name.removeprefix(root).split("/")
    return any(part.startswith(".") or (part.startswith("_") and "=" not in part) for part in below)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_folder(name: str, info: dict[str, Any]) -> bool:
    """Tell whether a name stands for a folder: consoles and Hadoop make empty objects of such names."""
    if info.get("type", "file") != "file":
        return True
    return info.get("size") == 0 and name.endswith(FOLDER_ENDINGS)


def _object_info(fs: Any, info: dict[str, Any]) -> ObjectInfo:
    etag = next((str(info[key]).strip('"') for key in _ETAG_KEYS if info.get(key) is not None), None)
    times = (info[key] for key in _TIME_KEYS if info.get(key) is not None)
    version = etag or str(next(times, NO_VERSION))
    # Local files have no etag; modification time and inode change with every whole-file write.
    etag = etag or (f"{version}-{info['ino']}" if "ino" in info else version)
    uri = fs.unstrip_protocol(info["name"])
    if info.get("size") is None:
        raise OSError(errno.EINVAL, "the server does not tell its size")
    return ObjectInfo(uri=uri, size=int(info["size"]), etag=etag, version=version)


def _write_local(path: Path, data: bytes, *, exclusive: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            _link(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # fails if the name is taken, unlike a rename
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        raise OSError(
            errno.ENOTSUP,
            "this file system has no hard links, without which two runs could overwrite each other; "
            "use another one, or the bucket's own URI instead of a mount of it",
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power cut, where the system lets a folder be synced."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _says_exists(error: Exception) -> bool:
    # s3fs turns HTTP 412 into OSError(EINVAL, "... pre-conditions ..."), not into FileExistsError.
    text = str(error).lower()
    return isinstance(error, FileExistsError) or "pre-condition" in text or "preconditionfailed" in text


def _is_transient(error: BaseException) -> bool:
    code = _server_code(error)
    if code in _TRANSIENT_CODES:
        return True
    if code in _PERMANENT_CODES:
        return False
    if isinstance(error, OSError):
        return not isinstance(error, _PERMANENT_TYPES) and error.errno not in _PERMANENT_ERRNOS
    return bool(_TRANSIENT_NAMES & _type_names(error))


def _is_refusal(verb: str, error: Exception) -> bool:
    """Tell whether the store would say the same to the next run, as long as nobody changes the store."""
    code = _server_code(error)
    if code in _EXPIRED_CODES:
        return False
    if isinstance(error, FileNotFoundError):
        # What is to be read may be on its way; where to write there is no place.
        return code == "NoSuchBucket" or verb in ("write", "create")
    refusals = (
        PermissionError,
        FileExistsError,
        IsADirectoryError,
        NotADirectoryError,
        ImportError,
        ValueError,
    )
    if isinstance(error, refusals) or _type_names(error) & _CREDENTIAL_NAMES:
        return True
    return isinstance(error, OSError) and error.errno in _PERMANENT_ERRNOS - _FULL_ERRNOS


def _server_code(error: BaseException) -> str:
    """Return the error code in the S3 answer behind an exception, or an empty string."""
    for e in (error, error.__cause__):
        response = getattr(e, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _is_of_client(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in _CLIENT_MODULES


def _type_names(error: BaseException) -> set[str]:
    return {t.__name__ for t in type(error).__mro__}


def _explain(verb: str, uri: str, error: BaseException) -> str:
    hint = ""
    if isinstance(error, FileNotFoundError):
        hint = " (no such object, folder or bucket)"
    elif isinstance(error, PermissionError):
        hint = " (access refused: check the credentials in the environment and the bucket policy)"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = " (no space left; nothing half-written was kept)"
    elif _type_names(error) & _CREDENTIAL_NAMES:
        hint = " (no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role)"
    return f"cannot {verb} {uri}: {type(error).__name__}: {error}{hint}"
