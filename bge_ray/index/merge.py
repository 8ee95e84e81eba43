"""Merge parts by ranges of lists.

Merging copies bytes: `header.ivf_header` plus `merge_range` over consecutive ranges is the file that FAISS
would have written after adding the same batches in one process. FAISS's own merges are not used:
`merge_ondisk` takes parts of another training without a word, others need the whole in RAM.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from bge_ray.errors import IndexBuildError
from bge_ray.index.factory import ID_BYTES
from bge_ray.index.part import Part, part_sizes, read_lists
from bge_ray.index.train import TrainedIndex
from bge_ray.schema import IdArray

CHUNK_BYTES = 8 << 20
# Object storage answers after tens of milliseconds; a range reads every part.
_READ_THREADS = 8


@dataclass(frozen=True)
class ListRange:
    """Lists [start, stop) and the bytes of their codes and ids."""

    start: int
    stop: int
    n_bytes: int


def total_sizes(trained: TrainedIndex, parts: Sequence[Part]) -> IdArray:
    """Add up the list sizes of parts, after checking that they belong together.

    Args:
        trained: what the parts must have been made with.
        parts: at least one.

    Returns:
        (nlist,) int64.

    Raises:
        IndexBuildError: what `check_parts` refuses, or a damaged table.
    """
    check_parts(trained, parts)
    total = np.zeros(trained.spec.nlist, np.int64)
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for sizes in pool.map(part_sizes, parts):
            total += sizes
    rows = sum(part.head.rows for part in parts)
    if total.sum() != rows:
        raise IndexBuildError(f"the lists hold {total.sum()} vectors, the heads of the parts say {rows}")
    return total


def check_parts(trained: TrainedIndex, parts: Sequence[Part]) -> None:
    """Refuse parts that were encoded with another trained index, or the same rows twice.

    Raises:
        IndexBuildError: no parts, another training hash or layout, or two parts with the same ids.
    """
    spec = trained.spec
    if not parts:
        raise IndexBuildError("no index parts to merge")
    seen: dict[str, str] = {}
    for part in parts:
        head = part.head
        if head.training_sha256 != trained.sha256:
            raise IndexBuildError(
                f"index part {part.name} was made with the trained index {head.training_sha256[:12]}, "
                f"not {trained.sha256[:12]}: build it again"
            )
        if (head.nlist, head.code_size) != (spec.nlist, spec.code_size):
            raise IndexBuildError(
                f"index part {part.name} has {head.nlist} lists with codes of {head.code_size} bytes, "
                f"{spec.factory} has {spec.nlist} with {spec.code_size}"
            )
        if head.rows and head.ids_sha256 in seen:
            raise IndexBuildError(
                f"index parts {seen[head.ids_sha256]} and {part.name} hold the same vectors"
            )
        seen[head.ids_sha256] = part.name


def plan_ranges(trained: TrainedIndex, sizes: IdArray, max_bytes: int) -> list[ListRange]:
    """Cut the lists into consecutive ranges of near-equal bytes.

    Args:
        trained: kind IVF.
        sizes: (nlist,) int64 from `total_sizes`.
        max_bytes: most bytes of a range, which is what its merge task holds in memory; a single
            list larger than this becomes a range of its own.

    Returns:
        Ranges that cover every list once, in order; at least one.
    """
    if max_bytes < 1:
        raise IndexBuildError(f"a range needs at least 1 byte, got {max_bytes}")
    entry = trained.spec.code_size + ID_BYTES
    ends = np.concatenate([[0], np.cumsum(sizes)]) * entry
    n_ranges = max(1, -(-int(ends[-1]) // max_bytes))
    even = -(-int(ends[-1]) // n_ranges)
    ranges = []
    start = 0
    while start < len(sizes):
        # Up to the even share, rounded up to a whole list where that stays within max_bytes.
        stop = int(np.searchsorted(ends, ends[start] + even))
        if stop > len(sizes) or ends[stop] - ends[start] > max_bytes:
            stop = int(np.searchsorted(ends, ends[start] + max_bytes, side="right")) - 1
        stop = min(max(stop, start + 1), len(sizes))
        if ends[stop] == ends[-1]:
            stop = len(sizes)  # empty lists at the end need no range
        ranges.append(ListRange(start, stop, int(ends[stop] - ends[start])))
        start = stop
    return ranges


def merge_range(parts: Sequence[Part], lists: ListRange) -> Iterator[bytes]:
    """Merge a range of lists of an IVF index.

    Memory: the bytes of the range, plus one chunk.

    Args:
        parts: in the order their vectors shall have within a list; `check_parts` has seen them.
        lists: from `plan_ranges`.

    Yields:
        The ``lists.n_bytes`` bytes that follow the header (and the ranges before) in the index
        file, in chunks of about CHUNK_BYTES.

    Raises:
        IndexBuildError: a part is truncated or damaged, or these are not the parts that were
            planned with. Raised before the first chunk.
    """
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        inputs = list(pool.map(lambda part: read_lists(part, lists.start, lists.stop), parts))
    found = sum(len(given.data) for given in inputs)
    if found != lists.n_bytes:
        raise IndexBuildError(
            f"lists {lists.start} to {lists.stop} hold {found} bytes, {lists.n_bytes} were planned"
        )
    places = [0] * len(parts)
    chunk: list[memoryview] = []
    chunk_bytes = 0
    for number in range(lists.stop - lists.start):
        ids = []
        for which, (part, given) in enumerate(zip(parts, inputs, strict=True)):
            size = given.sizes[number]
            if not size:
                continue
            begin = places[which]
            middle = begin + size * part.head.code_size
            end = places[which] = middle + size * ID_BYTES
            chunk.append(given.data[begin:middle])
            ids.append(given.data[middle:end])
            chunk_bytes += end - begin
        chunk += ids
        if chunk_bytes >= CHUNK_BYTES:
            yield b"".join(chunk)
            chunk, chunk_bytes = [], 0
    if chunk:
        yield b"".join(chunk)
