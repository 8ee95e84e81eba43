"""A published index is read as it was written, or not at all."""

from pathlib import Path

import pytest

from bge_ray.errors import DatasetMismatchError
from bge_ray.pipeline.index.published import read_index
from bge_ray.records.canonical import to_json
from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import open_folder
from tests.report.samples import index_description


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (b'"effort": 7', b'"effort": 1', r"index\.json: was changed since it was written; restore it"),
        (b'"effort": 7', b'"effort": "x"', r"not an index description of ours, or damaged \(effort: "),
        (b"{", b"", r"not an index description of ours, or damaged"),
    ],
)
def test_one_that_was_changed_by_hand_is_refused(
    storage: Storage, tmp_path: Path, before: bytes, after: bytes, said: str
) -> None:
    description = index_description(effort=7)
    data = to_json(description)
    assert before in data
    open_folder(storage, str(tmp_path / "index"), "index", "output.uri").put("index.json", data)
    assert read_index(storage, str(tmp_path)) == description
    (tmp_path / "index/index.json").write_bytes(data.replace(before, after, 1))
    with pytest.raises(DatasetMismatchError, match=said) as caught:
        read_index(storage, str(tmp_path))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
