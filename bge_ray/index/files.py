"""Whole index files from parts: all lists in one file, or a range of lists in each of several."""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from bge_ray.errors import IndexBuildError
from bge_ray.index.factory import ID_BYTES, Kind
from bge_ray.index.header import HeaderFormatError, flat_header, ivf_header
from bge_ray.index.merge import CHUNK_BYTES, ListRange, check_parts, merge_range, plan_ranges
from bge_ray.index.package import faiss
from bge_ray.index.part import WAY_OUT, Part, list_crc, read_lists
from bge_ray.index.train import TrainedIndex
from bge_ray.records.ids import IdArray

RANGE_BYTES = 256 << 20


def merged_file(
    trained: TrainedIndex, parts: Sequence[Part], sizes: IdArray, lists: ListRange | None = None
) -> Iterator[bytes]:
    """Make one self-contained index file, of all lists or of a range.

    A file of a range opens like any other and knows all centroids; its results, merged with those of
    the other ranges at the same nprobe, equal those of the one file (RaBitQ2 to RaBitQ9: but for a few
    in a thousand, since FAISS skips codes by what it found before). An index of kind FLAT is
    merged whole; give a subset of the parts to split it. If FAISS writes a header unknown here,
    FAISS itself builds the file, in memory.

    Memory: RANGE_BYTES or the longest list, plus the trained index; constant for kind FLAT.

    Args:
        trained: what the parts were made with.
        parts: in the order their vectors shall have.
        sizes: (nlist,) int64 from `total_sizes` of these parts.
        lists: the range; None for all.

    Yields:
        The file in chunks.

    Raises:
        IndexBuildError: the parts do not belong together, or one is truncated or damaged. This can come
            after the first chunk, so a file must not be published before the end.
    """
    check_parts(trained, parts)
    start, stop = (lists.start, lists.stop) if lists else (0, trained.spec.nlist)
    inside = np.zeros_like(sizes)
    inside[start:stop] = sizes[start:stop]
    try:
        if trained.spec.kind is Kind.FLAT:
            before, between = flat_header(trained, int(inside.sum()))
        else:
            before, between = ivf_header(trained, inside), b""
    except HeaderFormatError:
        yield rebuild(trained, parts, lists)
        return
    yield before
    if trained.spec.kind is Kind.FLAT:
        yield from _flat_columns(parts, between)
        return
    for piece in plan_ranges(trained, sizes[start:stop], RANGE_BYTES):
        yield from merge_range(parts, ListRange(start + piece.start, start + piece.stop, piece.n_bytes))


def rebuild(trained: TrainedIndex, parts: Sequence[Part], lists: ListRange | None = None) -> bytes:
    """Do the work of `merged_file` by FAISS's own functions.

    It is the way out when FAISS's file layout is not the one known here. Memory: three times the result.

    Args:
        trained: what the parts were made with.
        parts: in the order their vectors shall have.
        lists: the range; None for all.
    """
    check_parts(trained, parts)
    index = trained.open()
    ivf = faiss.try_extract_index_ivf(index)
    start, stop = (lists.start, lists.stop) if lists else (0, trained.spec.nlist)
    for part in parts:
        found = read_lists(part, start, stop)
        data = np.frombuffer(found.data, np.uint8)
        place = 0
        for number, size in enumerate(found.sizes, start):
            middle = place + size * part.head.code_size
            end = middle + size * ID_BYTES
            codes, ids = data[place:middle].copy(), data[middle:end].copy().view(np.int64)
            place = end
            if not size:
                continue
            if ivf is None:
                index.add_sa_codes(codes.reshape(size, -1), ids)
            else:
                ivf.invlists.add_entries(number, size, faiss.swig_ptr(ids), faiss.swig_ptr(codes))
                ivf.ntotal += size
    if ivf is not None:
        index.ntotal = ivf.ntotal
    return bytes(faiss.serialize_index(index).tobytes())


def _flat_columns(parts: Sequence[Part], between: bytes) -> Iterator[bytes]:
    """Yield the codes of all parts, ``between``, the ids of all parts; check each part at its end."""
    crcs = []
    for part in parts:
        crc = 0
        for chunk in _chunks(part, 0, part.head.rows * part.head.code_size):
            crc = zlib.crc32(chunk, crc)
            yield chunk
        crcs.append(crc)
    yield between
    for part, crc in zip(parts, crcs, strict=True):
        head = part.head
        for chunk in _chunks(part, head.rows * head.code_size, head.rows * ID_BYTES):
            crc = zlib.crc32(chunk, crc)
            yield chunk
        if head.rows and crc != list_crc(part, 0):
            raise IndexBuildError(f"index part {part.name} is damaged{WAY_OUT}")


def _chunks(part: Part, begin: int, length: int) -> Iterator[bytes]:
    for offset in range(begin, begin + length, CHUNK_BYTES):
        size = min(CHUNK_BYTES, begin + length - offset)
        yield part.read_exactly(part.head.lists_offset + offset, size)
