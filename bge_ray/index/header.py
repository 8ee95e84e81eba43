"""The bytes of an index file before its lists, made from the trained index and the list sizes.

A FAISS file of an IVF index is its header, the size of every list, then per list codes and ids; one
of IDMap2 over flat codes is its header, all codes, the number of ids, all ids. The header comes
from FAISS; only the tail that follows from the sizes is written here, and checked against the
tail that FAISS wrote for the empty index, so that another FAISS version is noticed.
"""

import struct

import numpy as np

from bge_ray.errors import IndexBuildError
from bge_ray.index.factory import Kind
from bge_ray.index.package import faiss
from bge_ray.index.train import TrainedIndex
from bge_ray.records.ids import IdArray

_U64 = struct.Struct("<Q")


class HeaderFormatError(IndexBuildError):
    """FAISS writes another layout than the one known here; the lists must go through FAISS itself."""


def ivf_header(trained: TrainedIndex, sizes: IdArray, *, nprobe: int | None = None) -> bytes:
    """Make the header of an IVF index file.

    Followed by the bytes of `merge.merge_range` over all lists, it is an ordinary FAISS file.
    For a file that holds only some lists, set the sizes of the others to 0.

    Args:
        trained: kind IVF.
        sizes: (nlist,) int64 vectors in each list.
        nprobe: what plain FAISS probes on opening the file; None keeps the trained index's default.

    Raises:
        HeaderFormatError: FAISS does not write the layout known here.
        IndexBuildError: the sizes are not nlist numbers >= 0, or the index is of another kind.
    """
    spec = trained.spec
    if spec.kind is not Kind.IVF:
        raise IndexBuildError(f"{spec.factory} is no IVF index: use files.merged_file")
    if sizes.shape != (spec.nlist,) or (sizes < 0).any():
        raise IndexBuildError(
            f"{spec.factory}: a header needs {spec.nlist} list sizes >= 0, got {sizes.shape}"
        )
    index = trained.open()
    ivf = faiss.extract_index_ivf(index)
    index.ntotal = ivf.ntotal = int(sizes.sum())
    if nprobe is not None:
        ivf.nprobe = nprobe
    data = faiss.serialize_index(index).tobytes()
    # An empty index has its sizes written sparsely: no pairs. FAISS switches to the full form
    # when half of the lists hold something.
    lists = b"ilar" + struct.pack("<QQ", spec.nlist, spec.code_size)
    tail = lists + b"sprs" + _U64.pack(0)
    if not data.endswith(tail):
        raise HeaderFormatError(
            f"FAISS {faiss.__version__} writes the lists of {spec.factory} in another layout"
        )
    return bytes(data[: -len(tail)] + lists + _list_sizes(sizes))


def flat_header(trained: TrainedIndex, rows: int) -> tuple[bytes, bytes]:
    """Make what stands before the codes and between codes and ids of an IDMap2 file over flat codes.

    Args:
        trained: kind FLAT.
        rows: number of vectors.

    Raises:
        HeaderFormatError: FAISS does not write the layout known here.
    """
    data, unit = _flat_start(trained, rows)
    # Nothing in these bytes says which number is the length of the codes, so the layout is proven
    # on three vectors each time.
    probe = trained.open()
    codes = probe.index.sa_encode(np.eye(3, trained.spec.dim, dtype=np.float32))
    ids = np.array([7, 5, 9], np.int64)
    probe.add_sa_codes(codes, ids)
    start, _ = _flat_start(trained, 3)
    expected = start + _U64.pack(codes.nbytes // unit) + codes.tobytes() + _U64.pack(3) + ids.tobytes()
    if faiss.serialize_index(probe).tobytes() != expected:
        raise HeaderFormatError(f"FAISS {faiss.__version__} writes {trained.spec.factory} in another layout")
    return data + _U64.pack(rows * trained.spec.code_size // unit), _U64.pack(rows)


def _flat_start(trained: TrainedIndex, rows: int) -> tuple[bytes, int]:
    """Return the bytes before the length of the codes, and the unit in bytes of that length."""
    index = trained.open()
    inner = faiss.downcast_index(index.index)
    index.ntotal = inner.ntotal = rows
    data = faiss.serialize_index(index).tobytes()
    if not data.endswith(bytes(2 * _U64.size)):  # the lengths of no codes and no ids
        raise HeaderFormatError(f"FAISS {faiss.__version__} writes {trained.spec.factory} in another layout")
    return bytes(data[: -2 * _U64.size]), 4 if isinstance(inner, faiss.IndexFlat) else 1


def _list_sizes(sizes: IdArray) -> bytes:
    filled = np.flatnonzero(sizes)
    if len(filled) > len(sizes) // 2:
        return b"full" + _U64.pack(len(sizes)) + sizes.astype("<u8").tobytes()
    pairs = np.stack([filled, sizes[filled]], axis=1)
    return b"sprs" + _U64.pack(pairs.size) + pairs.astype("<u8").tobytes()
