"""The report of a run: written in one place, which remembers where, for the last line of the log."""

from bge_ray.storage.objects import Storage, join

_written: list[str] = []


def write_report(storage: Storage, folder: str, page: bytes, facts: bytes) -> None:
    """Write report.html, then report.json, which vouches for the run files where it says ``complete``.

    Raises:
        StorageError: not written, or only in part.
    """
    storage.write(join(folder, "report.html"), page)
    storage.write(join(folder, "report.json"), facts)
    _written.append(join(folder, "report.html"))


def last_report() -> str | None:
    """Return the URI of the page that this process wrote last; None if it wrote none."""
    return _written[-1] if _written else None
