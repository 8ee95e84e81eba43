"""What is in the way is found before anything is written, whatever its size."""

from pathlib import Path

import pytest

from bge_ray.errors import OutputCollisionError
from bge_ray.pipeline.work import refuse_taken
from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import OwnedFolder
from bge_ray.storage.reports import write_report


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lease.json", b'{"hello":"mine"}'),
        ("_retired.json", b'{"hello":"mine"}'),
        ("_bge_ray.json", b"{}"),
        ("result.json", b"4321"),  # of the size of ours
        ("report.json", b"factz"),
        ("report.html", b"pag"),
    ],
)
def test_a_foreign_file_is_refused_and_nothing_is_written(
    storage: Storage, tmp_path: Path, name: str, content: bytes
) -> None:
    folders = [OwnedFolder(storage, str(tmp_path / n), "run", "a.output", ("result.json",)) for n in "ab"]
    refuse_taken(folders)
    for folder in folders:
        folder.put("result.json", b"1234")
        write_report(folder, b"page", b"facts")
    refuse_taken(folders)
    (tmp_path / "b" / name).write_bytes(content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputCollisionError) as caught:
        refuse_taken(folders)
    assert str(tmp_path / "b" / name) in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
