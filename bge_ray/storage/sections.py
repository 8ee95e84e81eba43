"""Many byte strings in one object, its sections: each is read on its own, and proved by a digest of its own.

The object is MAGIC, the number n of sections, the n + 1 places where they begin and end, and the sections,
each behind the digest of its number and its content. Numbers and places are little-endian uint64 of 40 bits
and a check of 24. So a reader of one section needs two small requests, whatever else is in the object, and a
flipped bit anywhere is noticed, before it makes a request of terabytes.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from bge_ray.errors import StorageError
from bge_ray.storage.objects import Storage

MAGIC = b"bgesects"
NUMBER = np.dtype("<u8")
NUMBER_BITS = np.uint64(40)
# 2 to the 64th over the golden ratio: the high bits of a product depend on every bit of the other factor.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
HEADER_BYTES = len(MAGIC) + NUMBER.itemsize
DIGEST_BYTES = 16
# Bytes between two sections that are rather read along than asked around.
GAP_BYTES = 1 << 16


def pack_sections(contents: Sequence[bytes]) -> bytes:
    """Return the object that has the given sections, numbered from 0."""
    lengths = [DIGEST_BYTES + len(content) for content in contents]
    borders = np.cumsum([HEADER_BYTES + NUMBER.itemsize * (len(contents) + 1), *lengths])
    parts = [MAGIC, _checked(np.asarray([len(contents), *borders]))]
    for number, content in enumerate(contents):
        parts += [_digest(number, content), content]
    return b"".join(parts)


def count_sections(storage: Storage, uri: str) -> int:
    """Return how many sections an object has.

    Raises:
        StorageError: it is missing, or has none.
    """
    header = storage.read_range(uri, 0, HEADER_BYTES)
    if len(header) != HEADER_BYTES or not header.startswith(MAGIC):
        raise _damaged(uri)
    return int(_numbers(uri, header[len(MAGIC) :])[0])


def section_sizes(storage: Storage, uri: str) -> npt.NDArray[np.int64]:
    """Return the (n,) bytes of each section of an object, its digest not counted.

    Raises:
        StorageError: it is missing, or has no sections.
    """
    return np.diff(_borders(storage, uri, 0, count_sections(storage, uri))) - DIGEST_BYTES


def read_sections(storage: Storage, uri: str, numbers: Iterable[int]) -> list[bytes]:
    """Return some sections of an object, in the order of their numbers; each number counts once.

    Raises:
        StorageError: it is missing, or a section is not what was written.
    """
    wanted = sorted(set(numbers))
    if not wanted:
        return []
    first = wanted[0]
    borders = _borders(storage, uri, first, wanted[-1] + 1)
    found: list[bytes] = []
    for run in _runs(wanted, borders):
        start = int(borders[run[0] - first])
        stop = int(borders[run[-1] + 1 - first])
        data = storage.read_range(uri, start, stop)
        if len(data) != stop - start:
            raise _damaged(uri)
        for number in run:
            at, end = (int(place) - start for place in borders[number - first : number - first + 2])
            digest, content = data[at : at + DIGEST_BYTES], data[at + DIGEST_BYTES : end]
            if _digest(number, content) != digest:
                raise _damaged(uri)
            found.append(content)
    return found


def _borders(storage: Storage, uri: str, first: int, stop: int) -> npt.NDArray[np.int64]:
    """Return where the sections from ``first`` to before ``stop`` begin, and where the last one ends."""
    start = HEADER_BYTES + NUMBER.itemsize * first
    end = HEADER_BYTES + NUMBER.itemsize * (stop + 1)
    data = storage.read_range(uri, start, end)
    if len(data) != end - start:
        raise _damaged(uri)
    borders = _numbers(uri, data)
    if borders[0] < HEADER_BYTES or (np.diff(borders) < DIGEST_BYTES).any():
        raise _damaged(uri)
    return borders


def _checked(numbers: npt.NDArray[np.int64]) -> bytes:
    """Return numbers with their checks."""
    values = numbers.astype(NUMBER)
    return bytes((values | values * _MULTIPLIER >> NUMBER_BITS << NUMBER_BITS).tobytes())


def _numbers(uri: str, data: bytes) -> npt.NDArray[np.int64]:
    """Return numbers without their checks; refuses those that do not fit theirs."""
    values = np.frombuffer(data, NUMBER)
    numbers = (values & (np.uint64(1) << NUMBER_BITS) - np.uint64(1)).astype(np.int64)
    if _checked(numbers) != data:
        raise _damaged(uri)
    return numbers


def _runs(wanted: Sequence[int], borders: npt.NDArray[np.int64]) -> list[list[int]]:
    """Cut ascending numbers of sections into runs that one request reads."""
    runs = [[wanted[0]]]
    for number in wanted[1:]:
        gap = borders[number - wanted[0]] - borders[runs[-1][-1] + 1 - wanted[0]]
        if gap <= GAP_BYTES:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _digest(number: int, content: bytes) -> bytes:
    digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=DIGEST_BYTES)
    digest.update(content)
    return digest.digest()


def _damaged(uri: str) -> StorageError:
    return StorageError(f"{uri}: is damaged, or was not written by this project; remove it and run again")
