"""One object out of several: on S3 by server-side copies, so that no machine holds or moves the whole.

Also large objects out of memory, in parts, because one request of 256 MB is copied twice on its way
through the client.
"""

import contextlib
import itertools
import logging
import os
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from bge_ray.errors import StorageError
from bge_ray.storage.objects import TEMPORARY_SUFFIX, Storage, is_local

logger = logging.getLogger(__name__)

# S3: every part of a multipart upload but the last has 5 MiB to 5 GiB, and there are at most 10,000.
MIN_PART_BYTES = 5 << 20
MAX_PART_BYTES = 5 << 30
MAX_PARTS = 10_000
COPY_BYTES = 8 << 20
UPLOAD_BYTES = 16 << 20
COPIES_AT_ONCE = 8


@dataclass(frozen=True)
class Piece:
    """An object and its size in bytes."""

    uri: str
    size: int


@dataclass(frozen=True)
class Slice:
    """Bytes [start, stop) of the piece of that number."""

    piece: int
    start: int
    stop: int


def concatenate(storage: Storage, pieces: Sequence[Piece], uri: str) -> None:
    """Make the object ``uri`` the concatenation of others; it appears complete or not at all.

    Args:
        storage: for retries.
        pieces: on the same file system, in order, of any size.
        uri: what to make; replaced if it exists.

    Raises:
        StorageError: a piece is missing or has another size, there are too many for S3, or the storage
            failed for good.
    """
    fs, _ = url_to_fs(uri)
    if _is_s3(fs):
        _concatenate_s3(storage, pieces, uri)
    elif is_local(fs):
        storage.attempt("assemble", uri, lambda _, path: _concatenate_local(pieces, Path(path)))
    else:
        storage.attempt("assemble", uri, lambda fs, path: _concatenate_stream(fs, pieces, path))
    made = storage.info(uri)
    size = sum(piece.size for piece in pieces)
    if made is None or made.size != size:
        raise StorageError(f"{uri}: has {made.size if made else 'no'} bytes, {size} were put together")


def write_large(storage: Storage, uri: str, data: bytes | bytearray) -> None:
    """Write an object that may have hundreds of megabytes; it appears complete or not at all."""
    fs, _ = url_to_fs(uri)
    if not _is_s3(fs) or len(data) < 2 * UPLOAD_BYTES:
        storage.write(uri, bytes(data))
        return
    storage.attempt(
        "write",
        uri,
        lambda fs, path: fs.pipe_file(path, data, chunksize=UPLOAD_BYTES, max_concurrency=2),
    )


def remove_unfinished(storage: Storage, uri: str) -> int:
    """Remove what killed processes left of uploads below a folder: S3 keeps, and bills, it for ever.

    Nobody else may be writing there. A store that does not let us look is left as it is.

    Returns:
        How many uploads were given up.
    """
    fs, _ = url_to_fs(uri)
    if not _is_s3(fs):
        return storage.remove_temporaries(uri)

    def remove(fs: Any, path: str) -> int:
        bucket, _, prefix = path.partition("/")
        answer = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
        uploads = [u for u in answer.get("Uploads") or [] if u["Key"].startswith(f"{prefix}/")]
        for upload in uploads:
            fs.call_s3(
                "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
            )
        return len(uploads)

    try:
        return storage.attempt("clean", uri, remove)
    except StorageError as error:
        logger.warning("unfinished uploads are not removed: %s", error)
        return 0


def plan_parts(
    sizes: Sequence[int], least: int = MIN_PART_BYTES, most: int = MAX_PART_BYTES
) -> list[list[Slice]]:
    """Cut pieces, laid end to end, into the parts of a multipart upload.

    Args:
        sizes: of the pieces, in bytes.
        least: of every part but the last.
        most: of every part; at least twice ``least``.

    Returns:
        The slices of each part. A part of one slice can be copied on the server; one of several has
        less than twice ``least`` bytes.
    """
    parts: list[list[Slice]] = []
    short: list[Slice] = []
    missing = 0
    for number, size in enumerate(sizes):
        start = 0
        if short and size:  # fill up what is too small for a part of its own
            start = min(missing, size)
            short.append(Slice(number, 0, start))
            missing -= start
            if missing == 0:
                parts.append(short)
                short = []
        rest = size - start
        if 0 < rest < least:
            short, missing = [Slice(number, start, size)], least - rest
        elif rest:
            count = -(-rest // most)
            edges = [start + rest * i // count for i in range(count + 1)]
            parts += [[Slice(number, a, b)] for a, b in itertools.pairwise(edges)]
    return [*parts, short] if short else parts


def _concatenate_s3(storage: Storage, pieces: Sequence[Piece], uri: str) -> None:
    parts = plan_parts([piece.size for piece in pieces])
    if len(parts) > MAX_PARTS:
        raise StorageError(
            f"{uri}: would need {len(parts):,} parts, S3 takes {MAX_PARTS:,}: raise index.range_bytes, or "
            "use index.layout ranges"
        )
    bucket, _, key = str(url_to_fs(uri)[1]).partition("/")
    where = {"Bucket": bucket, "Key": key}
    upload = storage.attempt(
        "assemble", uri, lambda fs, _: fs.call_s3("create_multipart_upload", **where)["UploadId"]
    )
    where["UploadId"] = upload

    def put(number: int) -> dict[str, Any]:
        etag = _put_part(storage, pieces, parts[number - 1], where | {"PartNumber": number})
        return {"PartNumber": number, "ETag": etag}

    def complete(fs: Any, _: str) -> None:
        try:
            fs.call_s3("complete_multipart_upload", **where, MultipartUpload={"Parts": done})
        except OSError:
            # The answer to a request that succeeded may be lost, and the upload is gone at the retry.
            made = storage.info(uri)
            if made is None or made.size != sum(piece.size for piece in pieces):
                raise

    try:
        with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
            done = list(pool.map(put, range(1, len(parts) + 1)))
        storage.attempt("assemble", uri, complete)
    except BaseException:
        with contextlib.suppress(StorageError):
            storage.attempt("give up", uri, lambda fs, _: fs.call_s3("abort_multipart_upload", **where))
        raise


def _put_part(
    storage: Storage, pieces: Sequence[Piece], slices: Sequence[Slice], where: dict[str, Any]
) -> str:
    """Copy or upload one part; returns its ETag."""
    first = slices[0]
    source = pieces[first.piece]
    if len(slices) == 1 and first.stop - first.start >= MIN_PART_BYTES:
        bucket, _, key = str(url_to_fs(source.uri)[1]).partition("/")
        options: dict[str, Any] = where | {"CopySource": {"Bucket": bucket, "Key": key}}
        if first.stop - first.start != source.size:
            options["CopySourceRange"] = f"bytes={first.start}-{first.stop - 1}"
        answer = storage.attempt(
            "copy", source.uri, lambda fs, _: fs.call_s3("upload_part_copy", **options)["CopyPartResult"]
        )
        return str(answer["ETag"])
    data = b"".join(storage.read_range(pieces[s.piece].uri, s.start, s.stop) for s in slices)
    if len(data) != sum(s.stop - s.start for s in slices):
        raise StorageError(f"{source.uri}: is shorter than the {source.size} bytes it should have")
    answer = storage.attempt(
        "upload", source.uri, lambda fs, _: fs.call_s3("upload_part", **where, Body=data)
    )
    return str(answer["ETag"])


def _concatenate_local(pieces: Sequence[Piece], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as target:
            for piece in pieces:
                with Path(str(url_to_fs(piece.uri)[1])).open("rb") as source:
                    shutil.copyfileobj(source, target, COPY_BYTES)
            target.flush()
            os.fsync(target.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _concatenate_stream(fs: Any, pieces: Sequence[Piece], path: str) -> None:
    # fsspec's own upload is published at the end of the transaction and thrown away on an error.
    with fs.transaction, fs.open(path, "wb") as target:
        for piece in pieces:
            with fs.open(str(url_to_fs(piece.uri)[1]), "rb") as source:
                shutil.copyfileobj(source, target, COPY_BYTES)


def _is_s3(fs: Any) -> bool:
    return "s3" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
