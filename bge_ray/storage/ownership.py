"""Whose files are these: a journal in each written folder, which says what this project wrote there.

A file at a fixed name (report.json, run.parquet, ...) is replaced or removed only if its bytes are some
that the journal announced before they were written. So a process may die between any two requests: what
is announced and not there harms nobody, and what is there was announced. Everything else is foreign, and
stays.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from bge_ray.errors import OutputCollisionError, StorageError
from bge_ray.records.canonical import reader_of
from bge_ray.records.dataset import FileFact
from bge_ray.storage.concatenate import Piece, concatenate
from bge_ray.storage.objects import ObjectInfo, Storage, join

logger = logging.getLogger(__name__)

# The underscore keeps it out of every listing of ours.
JOURNAL = "_bge_ray.json"
FORMAT_VERSION = 1
# Contents remembered of one name: the one that is there, those of runs that died before they wrote theirs,
# and those of runs that were out of touch and may yet write.
KEPT_CONTENTS = 8
READ_BYTES = 8 << 20
READ_AHEAD = 4


@dataclass(frozen=True)
class Content:
    """The bytes of a file, by their number and their sha256 in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Journal:
    """Which job owns a folder, and for each fixed name what we wrote or were about to write, newest first."""

    owner: str
    files: dict[str, tuple[Content, ...]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def with_content(self, name: str, new: Content, there: Content | None) -> "Journal":
        """Add a content of a name, and forget the oldest ones, but never the one that is there."""
        kept = dict.fromkeys([new, *([there] if there else []), *self.files.get(name, ())])
        return dataclasses.replace(self, files={**self.files, name: tuple(kept)[:KEPT_CONTENTS]})


@dataclass(frozen=True)
class OwnedFolder:
    """A folder that one job writes; ``key`` is the setting that names it. The journal keeps all state.

    ``names`` are the files that a run puts there when all is done; a foreign one is refused before that.
    What is put into another job's folder as a guest has a ``journal`` of its own.
    """

    storage: Storage
    uri: str
    owner: str
    key: str
    names: tuple[str, ...] = ()
    journal: str = JOURNAL

    def check_owner(self) -> None:
        """Refuse a folder that is another job's output; reads only.

        Raises:
            OutputCollisionError: it is.
        """
        self._read()

    def is_claimed(self) -> bool:
        """Tell whether the folder has a journal of this owner."""
        try:
            return self._read() is not None
        except OutputCollisionError:
            return False

    def claim(self) -> None:
        """Write the journal, unless it is there.

        Raises:
            OutputCollisionError: the folder became another job's since it was opened.
        """
        self._update(lambda journal: journal)

    def refuse_foreign(self, names: Iterable[str]) -> None:
        """Refuse names that foreign files have; of what may be ours all bytes are read.

        Raises:
            OutputCollisionError: names the first.
        """
        for name in names:
            self.check_replaceable(name)

    def put(self, name: str, data: bytes) -> None:
        """Write a file in one step where nothing, or one of ours, has its name.

        Raises:
            OutputCollisionError: a foreign file has the name, or took it meanwhile.
        """
        content = Content(len(data), hashlib.sha256(data).hexdigest())
        written = False
        while not written:
            there = self.check_replaceable(name)
            self.announce(name, content.bytes, content.sha256)
            uri = join(self.uri, name)
            if there is None:
                written = self.storage.create(uri, data)
            else:
                written = self.storage.replace(uri, data, there.etag)

    def put_pieces(self, name: str, pieces: Sequence[Piece], sha256: str) -> None:
        """Put a file together out of objects, as `concatenate` does, where nothing foreign has its name.

        Args:
            name: of the file.
            pieces: in order.
            sha256: of the whole, in hex.

        Raises:
            OutputCollisionError: a foreign file has the name.
            StorageError: a piece is not what it should be, or the storage failed for good.
        """
        self.check_replaceable(name)
        self.announce(name, sum(piece.size for piece in pieces), sha256)
        concatenate(self.storage, pieces, join(self.uri, name))

    def announce(self, name: str, n_bytes: int, sha256: str) -> None:
        """Note what is about to be written at a name; to be called after `check_replaceable`."""
        new = Content(n_bytes, sha256)

        def add(journal: Journal) -> Journal:
            full = len(journal.files.get(name, ())) >= KEPT_CONTENTS
            return journal.with_content(name, new, self._look(name)[1] if full else None)

        self._update(add)

    def vouches_for(self, name: str, data: bytes) -> bool:
        """Tell whether bytes read at a name are some that were announced for it, or none ever were.

        Raises:
            OutputCollisionError: the journal is another job's, or not one that this version can read.
        """
        journal = self._read()
        known = journal.files.get(name) if journal is not None else None
        return known is None or Content(len(data), hashlib.sha256(data).hexdigest()) in known

    def known_names(self) -> list[str]:
        """Return the names of all files that were announced so far, there or not.

        Raises:
            OutputCollisionError: the journal is another job's, or not one that this version can read.
        """
        journal = self._read()
        return sorted(journal.files) if journal is not None else []

    def check_replaceable(self, name: str) -> ObjectInfo | None:
        """Return what has a name and is provably ours, or None if nothing has it; reads all its bytes.

        Raises:
            OutputCollisionError: a foreign file has the name.
        """
        there, content = self._look(name)
        if there is not None and content is None:
            raise self._collision(name)
        return there

    def _collision(self, name: str) -> OutputCollisionError:
        return OutputCollisionError(
            f"{join(self.uri, name)}: is in the way and was not written by this project, or was changed "
            f"since; move it away, or choose another {self.key}"
        )

    def remove(self, names: Iterable[str]) -> list[str]:
        """Remove the files that are provably ours.

        Returns:
            The names that foreign files have; those are left alone.
        """
        left = []
        for name in names:
            gone = False
            while not gone:
                there, content = self._look(name)
                if there is not None and content is None:
                    logger.warning("%s: was not written by this project, and stays", join(self.uri, name))
                    left.append(name)
                    break
                gone = there is None or self.storage.delete_seen(there.uri, there.etag)
        return left

    def _look(self, name: str) -> tuple[ObjectInfo | None, Content | None]:
        """Return what has a name, and which of the contents announced for it that is, if one."""
        uri = join(self.uri, name)
        while (there := self.storage.info(uri)) is not None:
            journal = self._read()
            known = journal.files.get(name, ()) if journal is not None else ()
            possible = {c.sha256: c for c in known if c.bytes == there.size}
            # A size that no content of ours has settles it without reading.
            try:
                content = possible.get(digest_object(self.storage, there)) if possible else None
            except StorageError:
                if self.storage.info(uri) == there:
                    raise
                continue
            # Bytes of two objects are read where one replaces the other meanwhile.
            if content is not None or self.storage.info(uri) == there:
                return there, content
        return None, None

    def _read(self) -> Journal | None:
        """Return the journal, or None where there is none.

        Raises:
            OutputCollisionError: it is another job's, or not one that this version can read.
        """
        uri = join(self.uri, self.journal)
        data = self.storage.read_optional(uri)
        if data is None:
            return None
        way_out = f"choose another {self.key}"
        try:
            journal: Journal = reader_of(Journal).validate_json(data)
        except ValueError as error:
            raise OutputCollisionError(
                f"{uri}: does not say what this project wrote there, so nothing may be replaced; {way_out}"
            ) from error
        if journal.format_version != FORMAT_VERSION:
            raise OutputCollisionError(
                f"{uri}: format {journal.format_version}, this version writes {FORMAT_VERSION}; {way_out}"
            )
        if journal.owner != self.owner:
            raise OutputCollisionError(
                f"{self.key} {self.uri}: is the folder of another job's output ({journal.owner}), not of "
                f"this one's ({self.owner}); {way_out}"
            )
        return journal

    def _update(self, change: Callable[[Journal], Journal]) -> None:
        """Change the journal; what another run wrote into it meanwhile is kept."""
        uri = join(self.uri, self.journal)
        written = False
        while not written:
            # The etag is older than the content: a journal that changes in between is read again.
            info, there = self.storage.info(uri), self._read()
            new = change(there or Journal(self.owner))
            if new == there:
                return
            data = json.dumps(dataclasses.asdict(new), indent=1, sort_keys=True).encode()
            if info is None:
                written = self.storage.create(uri, data)
            else:
                written = self.storage.replace(uri, data, info.etag)


def open_folder(storage: Storage, uri: str, owner: str, key: str, names: tuple[str, ...] = ()) -> OwnedFolder:
    """Return a folder to write to; nothing is written yet.

    Args:
        storage: for all requests.
        uri: of the folder, which need not exist.
        owner: the kind of output, such as ``dataset`` or ``run``.
        key: the setting that names the folder, for messages.
        names: of the files that a run puts there when all is done.

    Raises:
        OutputCollisionError: the folder is another job's output.
    """
    folder = OwnedFolder(storage, uri, owner, key, names)
    folder.check_owner()
    return folder


def holds(storage: Storage, uri: str, fact: FileFact) -> bool:
    """Tell whether an object has the size and the sha256 of a fact; reads all its bytes."""
    there = storage.info(uri)
    return there is not None and there.size == fact.bytes and digest_object(storage, there) == fact.sha256


def digest_object(storage: Storage, info: ObjectInfo) -> str:
    """Return the hex sha256 of an object, read in ranges, some of them ahead.

    Raises:
        StorageError: it is shorter than it was, or cannot be read.
    """
    digest = hashlib.sha256()
    for data in _ranges(storage, info):
        digest.update(data)
    return digest.hexdigest()


def _ranges(storage: Storage, info: ObjectInfo) -> Iterator[bytes]:
    """Yield the bytes of an object in order, READ_BYTES at once."""

    def read(start: int) -> bytes:
        stop = min(info.size, start + READ_BYTES)
        data = storage.read_range(info.uri, start, stop)
        if len(data) != stop - start:
            raise StorageError(f"{info.uri}: became shorter while it was read")
        return data

    starts = iter(range(0, info.size, READ_BYTES))
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        waiting = [pool.submit(read, start) for start in itertools.islice(starts, READ_AHEAD)]
        while waiting:
            data = waiting.pop(0).result()
            waiting += [pool.submit(read, start) for start in itertools.islice(starts, 1)]
            yield data
