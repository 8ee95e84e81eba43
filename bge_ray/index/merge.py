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
from bge_ray.index.part import Part, part_sizes, read_blocks, read_table
from bge_ray.index.train import TrainedIndex
from bge_ray.records.ids import IdArray

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
    """Merge a range of lists of an IVF index, as `merged_range` does, in chunks of CHUNK_BYTES."""
    data = memoryview(merged_range(parts, lists))
    for start in range(0, len(data), CHUNK_BYTES):
        yield bytes(data[start : start + CHUNK_BYTES])


def merged_range(parts: Sequence[Part], lists: ListRange) -> bytearray:
    """Merge a range of lists of an IVF index.

    Memory: the bytes of the range, the tables of the parts, and _READ_THREADS blocks of CHUNK_BYTES or of
    one part's longest list.

    Args:
        parts: in the order their vectors shall have within a list; `check_parts` has seen them.
        lists: from `plan_ranges`.

    Returns:
        The ``lists.n_bytes`` bytes that follow the header (and the ranges before) in the index file.

    Raises:
        IndexBuildError: a part is truncated or damaged, or these are not the parts that were
            planned with.
    """
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        tables = list(pool.map(lambda part: read_table(part, lists.start, lists.stop), parts))
        sizes = np.stack([table.sizes for table in tables])  # (parts, lists)
        code, entry = parts[0].head.code_size, parts[0].head.entry_bytes
        total = sizes.sum(axis=0)
        found = int(total.sum()) * entry
        if found != lists.n_bytes:
            raise IndexBuildError(
                f"lists {lists.start} to {lists.stop} hold {found} bytes, {lists.n_bytes} were planned"
            )
        # A list holds the codes of all parts, then their ids; each part's place in both is known now.
        begin = (np.cumsum(total) - total) * entry
        before = np.cumsum(sizes, axis=0) - sizes
        codes_at, ids_at = begin + before * code, begin + total * code + before * ID_BYTES
        merged = bytearray(lists.n_bytes)
        target = memoryview(merged)

        def place(which: int) -> None:
            codes_to, ids_to = codes_at[which].tolist(), ids_at[which].tolist()
            for first, block in read_blocks(parts[which], tables[which], CHUNK_BYTES):
                at = 0
                for number, size in enumerate(block.sizes, first):
                    middle, end = at + size * code, at + size * entry
                    target[codes_to[number] : codes_to[number] + middle - at] = block.data[at:middle]
                    target[ids_to[number] : ids_to[number] + end - middle] = block.data[middle:end]
                    at = end

        list(pool.map(place, range(len(parts))))
    return merged
