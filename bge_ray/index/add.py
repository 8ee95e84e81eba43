"""Encode embedding shards with a trained index: one part, or one HNSW index, a task."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from bge_ray.errors import IndexBuildError
from bge_ray.index.factory import Kind
from bge_ray.index.package import Index, faiss
from bge_ray.index.part import write_part
from bge_ray.index.train import TrainedIndex, rotate
from bge_ray.index.vectors import check_unique, check_vectors
from bge_ray.records.ids import FloatArray, IdArray

# A constant, and batches never cross embedding shards: the last bit of a code can depend on the
# rows that share a matrix product, and must not depend on how shards are dealt to tasks.
ADD_BATCH_ROWS = 16_384

# One embedding shard, or one row group of it: (n, dim) float16 or float32 vectors and (n,) int64 ids.
Shard: TypeAlias = tuple[npt.NDArray[Any], npt.NDArray[Any]]
# (n, d) float32 rows, after the rotation -> (n,) int64 list of each row, in [0, nlist), and (n,) whether
# that is beyond doubt; where it is not, the coarse quantizer decides.
Assign: TypeAlias = Callable[[FloatArray], tuple[IdArray, npt.NDArray[np.bool_]]]


def add_part(trained: TrainedIndex, shards: Iterable[Shard], *, assign: Assign | None = None) -> bytes:
    """Encode embedding shards into one part, byte for byte what FAISS would store.

    Memory: one shard (or row group), and twice the codes and ids of the part.

    Args:
        trained: kind IVF or FLAT.
        shards: whole embedding shards or their row groups, always the same; batches are cut from the
            first row of each on.
        assign: chooses the list of each row in place of the coarse quantizer, for instance on a GPU.

    Returns:
        The file that `part.open_part` reads. The same shards in the same order give the same bytes.

    Raises:
        IndexBuildError: a vector or id that `check_vectors` refuses, an id in two shards, a list
            number out of range, or an index of kind SHARDS.
    """
    spec = trained.spec
    if spec.kind is Kind.SHARDS:
        raise IndexBuildError(f"{spec.factory} cannot be merged from parts: build one index a shard")
    index = trained.open()
    lists, codes, ids = [_no_ids()], [np.empty((0, spec.code_size), np.uint8)], [_no_ids()]
    for rows, row_ids in _batches(shards, spec.dim):
        rows = rotate(index, rows)
        numbers = _assign(index, rows, assign)
        lists.append(numbers)
        codes.append(_encode(index, rows, numbers))
        ids.append(row_ids)
    all_lists, all_ids = np.concatenate(lists), np.concatenate(ids)
    all_codes = np.concatenate(codes)
    codes.clear()
    check_unique(all_ids)
    return write_part(trained.sha256, spec.nlist, all_lists, all_codes, all_ids)


def build_shard(trained: TrainedIndex, shards: Iterable[Shard]) -> bytes:
    """Build the index file of one HNSW shard, to be searched beside the others.

    Memory: the whole index, twice while it is written. One thread, so that the graph does not
    depend on which thread inserted a vector first; tasks run side by side instead.

    Args:
        trained: kind SHARDS.
        shards: what belongs into this index, at least one vector.

    Raises:
        IndexBuildError: a vector or id that `check_vectors` refuses, an id twice, no vector at
            all, or an index of another kind.
    """
    if trained.spec.kind is not Kind.SHARDS:
        raise IndexBuildError(f"{trained.spec.factory} is built from parts, not as shards")
    data, rows = _insert(trained.open(), shards)
    if not rows:
        raise IndexBuildError("an index shard needs at least one vector")
    return data


def complete_shard(data: bytes, shards: Iterable[Shard]) -> tuple[bytes, int]:
    """Insert more vectors into an HNSW shard; returns the file, and how many it holds by then.

    Args:
        data: a file of `build_shard`.
        shards: what it lacks; may be nothing.

    Raises:
        IndexBuildError: this is no index file; a vector or id that `check_vectors` refuses, or an id twice.
    """
    try:
        index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
    except RuntimeError as error:
        raise IndexBuildError(f"an index shard cannot be read: {error}") from error
    return _insert(index, shards)


def _insert(index: Index, shards: Iterable[Shard]) -> tuple[bytes, int]:
    ids = [faiss.vector_to_array(index.id_map)]
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        for rows, row_ids in _batches(shards, index.d):
            if len(rows):
                index.add_with_ids(rows, row_ids)
                ids.append(row_ids)
    finally:
        faiss.omp_set_num_threads(threads)
    check_unique(np.concatenate(ids))
    return faiss.serialize_index(index).tobytes(), int(index.ntotal)


def _batches(shards: Iterable[Shard], dim: int) -> Iterator[tuple[FloatArray, IdArray]]:
    for vectors, ids in shards:
        if len(vectors) != len(ids):
            raise IndexBuildError(f"{len(vectors)} vectors for {len(ids)} ids")
        for start in range(0, len(vectors), ADD_BATCH_ROWS):
            stop = start + ADD_BATCH_ROWS
            yield check_vectors(vectors[start:stop], ids[start:stop], dim)
        del vectors, ids  # before the next ones are read


def _assign(index: Index, rows: FloatArray, assign: Assign | None) -> IdArray:
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        return np.zeros(len(rows), np.int64)
    if assign is None:
        _, nearest = ivf.quantizer.search(rows, 1)
        numbers: IdArray = np.ascontiguousarray(nearest[:, 0])
    else:
        numbers, sure = assign(rows)
        if not sure.all():
            _, nearest = ivf.quantizer.search(np.ascontiguousarray(rows[~sure]), 1)
            numbers[~sure] = nearest[:, 0]
    if numbers.dtype != np.int64 or numbers.shape != (len(rows),):
        raise IndexBuildError(f"assignment is {numbers.dtype} {numbers.shape}, must be int64 ({len(rows)},)")
    # FAISS assigns a row that is not finite to list -1, drops it and still counts it.
    if numbers.min() < 0 or numbers.max() >= ivf.nlist:
        raise IndexBuildError(f"assignment names lists {numbers.min()} to {numbers.max()} of {ivf.nlist}")
    return numbers


def _encode(index: Index, rows: FloatArray, lists: IdArray) -> npt.NDArray[np.uint8]:
    """Encode (n, d) rows after the rotation to (n, code_size) bytes."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        flat: npt.NDArray[np.uint8] = faiss.downcast_index(index.index).sa_encode(rows)
        return flat
    codes = np.empty((len(rows), ivf.code_size), np.uint8)
    ivf.encode_vectors(len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(lists), faiss.swig_ptr(codes))
    return codes


def _no_ids() -> IdArray:
    return np.empty(0, np.int64)
