"""The local file system as a person sees it: a link is what it leads to, and nothing is left out."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem


class ThroughLinks(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A local file system for listings. fsspec's own leaves out links, and folders that it may not read."""

    def walk(
        self,
        path: str,
        maxdepth: int | None = None,
        above: tuple[str, ...] = (),
        **_: Any,
    ) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Yield (folder, its folders, its files) from the top down, with what `info` says of each by name.

        Names that start with a dot are left out. A path that is a file holds itself under an empty name.

        Args:
            path: where to begin; if it is not there, nothing is yielded.
            maxdepth: how many levels to go down, at least 1.
            above: real paths of the folders that led here.

        Raises:
            OSError: a folder cannot be read, or a link leads nowhere or back to a folder above it.
        """
        path = self._strip_protocol(path)
        if Path(path).is_file():
            yield path, {}, {"": self.info(path)}
            return
        real = os.path.realpath(path)
        if real in above:
            raise OSError(errno.ELOOP, f"{path} is a link that leads back to a folder above it")
        folders: dict[str, Any] = {}
        files: dict[str, Any] = {}
        try:
            with os.scandir(path) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except FileNotFoundError:
            return
        for entry in visible:
            try:
                info = self.info(entry.path)
            except FileNotFoundError as error:
                if entry.is_symlink():
                    raise OSError(errno.EINVAL, f"{entry.path} is a link that leads nowhere") from error
                continue  # removed since
            (folders if info["type"] == "directory" else files)[entry.name] = info
        yield path, folders, files
        if maxdepth is None or maxdepth > 1:
            deeper = None if maxdepth is None else maxdepth - 1
            for info in folders.values():
                yield from self.walk(info["name"], deeper, (*above, real))
