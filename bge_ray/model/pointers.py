"""What Git leaves in place of a large file that was not fetched."""

from pathlib import Path

from bge_ray.errors import ModelError

BEGINNING = b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """Refuse such a pointer.

    Raises:
        ModelError: the file is one.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(BEGINNING)) == BEGINNING:
            raise ModelError(f"{path}: is a pointer of Git LFS; fetch the file itself with `git lfs pull`")
