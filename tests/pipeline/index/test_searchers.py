"""An index file that is not what was written is told with a way out."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from bge_ray.errors import DamagedIndexError
from bge_ray.pipeline.index.searchers import Searcher
from bge_ray.pipeline.index.tasks import WrittenFile
from bge_ray.storage.objects import Storage


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (b"12345", "ends at byte 5 of 10"),
        (b"1234567899", "is damaged, its sha256 is"),
        (None, "is not there"),
    ],
)
def test_a_damaged_file_is_named_with_what_makes_it_anew(
    storage: Storage, tmp_path: Path, left: bytes | None, said: str
) -> None:
    path = tmp_path / "index.faiss"
    if left is not None:
        path.write_bytes(left)
    file = WrittenFile(str(path), 10, hashlib.sha256(b"1234567890").hexdigest(), 1)
    with pytest.raises(
        DamagedIndexError, match=f"index.faiss: {said}.*; run bge-ray index with index.verify"
    ):
        Searcher(storage, [file], 1).search(np.zeros((1, 4), np.float32), 1, None)
