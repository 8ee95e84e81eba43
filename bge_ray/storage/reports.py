"""The report of a run: written in one place, which remembers where, for the last line of the log."""

from typing import TypeVar

from bge_ray.records.reports import Report, read_report
from bge_ray.storage.objects import join
from bge_ray.storage.ownership import OwnedFolder, holds

R = TypeVar("R", bound=Report)

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


def standing_report(folder: OwnedFolder, kind: type[R], key: str) -> R | None:
    """Return the report of a folder if it is of a complete run by this key whose files are as they were.

    Reads all bytes of the files.
    """
    report = read_report(kind, folder.storage.read_optional(join(folder.uri, "report.json")))
    if report is None or not report.complete or report.key != key:
        return None
    whole = all(holds(folder.storage, join(folder.uri, fact.path), fact) for fact in report.files)
    return report if whole else None


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
