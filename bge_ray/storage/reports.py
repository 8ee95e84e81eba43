"""The report of a run: written in one place, which remembers where, for the last line of the log."""

from bge_ray.storage.objects import join
from bge_ray.storage.ownership import OwnedFolder

REPORT_FILES = ("report.json", "report.html")

_written: list[str] = []


def write_report(folder: OwnedFolder, page: bytes, facts: bytes) -> None:
    """Write report.html, then report.json, which vouches for the run files where it says ``complete``.

    Raises:
        OutputCollisionError: a foreign file has one of the names.
        StorageError: not written, or only in part.
    """
    folder.put("report.html", page)
    folder.put("report.json", facts)
    _written.append(join(folder.uri, "report.html"))


def report_is_whole(folder: OwnedFolder) -> bool:
    """Tell whether report.json and its page are there.

    Raises:
        OutputCollisionError: one was changed since it was written, or is not ours.
    """
    return all(folder.check_replaceable(name) is not None for name in REPORT_FILES)


def restore_page(folder: OwnedFolder, page: bytes) -> None:
    """Write report.html of the report that is there.

    Raises:
        OutputCollisionError: a foreign file has the name.
    """
    folder.put("report.html", page)


def retract_report(folder: OwnedFolder) -> None:
    """Remove the report of an earlier run, before anything of a new one appears under a final name.

    What vouches goes first: a report.html that is left over claims nothing about the files beside it.

    Raises:
        OutputCollisionError: a foreign file has one of the names.
    """
    for name in REPORT_FILES:
        folder.check_replaceable(name)
    folder.remove(REPORT_FILES)


def last_report() -> str | None:
    """Return the URI of the page that this process wrote last; None if it wrote none."""
    return _written[-1] if _written else None
