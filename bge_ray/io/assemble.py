"""One object out of several: on S3 by server-side copies, so that no machine holds or moves the whole."""

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from bge_ray.io.storage import TEMPORARY_SUFFIX, Storage, is_local

# S3: every part of a multipart upload but the last has at least 5 MiB, at most 5 GiB, at most 10,000 parts.
MIN_PART_BYTES = 5 << 20
MAX_PARTS = 10_000
COPY_BYTES = 8 << 20


def concatenate(storage: Storage, pieces: Sequence[str], uri: str) -> None:
    """Make the object ``uri`` the concatenation of others; it appears complete or not at all.

    Args:
        storage: for retries.
        pieces: URIs on the same file system, in order; on S3 each but the last of at least
            MIN_PART_BYTES.
        uri: what to make; replaced if it exists.

    Raises:
        StorageError: a piece is missing, or the storage failed for good.
    """
    storage.attempt("assemble", uri, lambda fs, path: _concatenate(fs, [_path_of(p) for p in pieces], path))


def _path_of(uri: str) -> str:
    return str(url_to_fs(uri)[1])


def _concatenate(fs: Any, pieces: list[str], path: str) -> None:
    if is_local(fs):
        _concatenate_local(pieces, Path(path))
    elif "s3" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        _concatenate_s3(fs, pieces, path)
    else:
        # fsspec's own upload is published by close() and thrown away by discard().
        with fs.transaction, fs.open(path, "wb") as target:
            for piece in pieces:
                with fs.open(piece, "rb") as source:
                    shutil.copyfileobj(source, target, COPY_BYTES)


def _concatenate_local(pieces: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as target:
            for piece in pieces:
                with Path(piece).open("rb") as source:
                    shutil.copyfileobj(source, target, COPY_BYTES)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _concatenate_s3(fs: Any, pieces: list[str], path: str) -> None:
    bucket, _, key = path.partition("/")
    upload = fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
    try:
        parts = []
        for number, piece in enumerate(pieces, 1):
            answer = fs.call_s3(
                "upload_part_copy",
                Bucket=bucket,
                Key=key,
                UploadId=upload,
                PartNumber=number,
                CopySource=piece,
            )
            parts.append({"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]})
        fs.call_s3(
            "complete_multipart_upload",
            Bucket=bucket,
            Key=key,
            UploadId=upload,
            MultipartUpload={"Parts": parts},
        )
    except BaseException:
        fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
        raise
