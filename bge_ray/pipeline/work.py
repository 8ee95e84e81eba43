"""The skeleton that every job fills: subtract what is done, do the rest, publish, report, sweep.

The order is what keeps the promises. All folders are leased before anything is written, and claimed, so
that no other job's files can be taken for ours. The report of an earlier run goes before anything of this
one appears under a final name, so that no report vouches for files of another run. The own report comes
after the files that it names, and what nobody needs is removed last.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from bge_ray.errors import BgeRayError, OutputCollisionError, StorageError
from bge_ray.pipeline.engine.stopping import Stopped, StopRequest, make_watch
from bge_ray.records.canonical import to_json
from bge_ray.records.reports import Report
from bge_ray.report.facts import RunFacts
from bge_ray.storage.lease import Leases, is_leased, refuse_foreign_lease
from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import OwnedFolder
from bge_ray.storage.reports import (
    REPORT_FILES,
    report_is_whole,
    restore_page,
    retract_report,
    write_report,
)
from bge_ray.storage.sweep import check_retired

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Report)


class Told:
    """Warns of each thing once, however often a run looks."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def warn(self, text: str) -> None:
        """Log a warning, unless it was."""
        if text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)


class Work(Protocol[R]):
    """One run of a job, planned; nothing is written before `carry_out`."""

    @property
    def storage(self) -> Storage:
        """For all requests."""

    @property
    def folders(self) -> Sequence[OwnedFolder]:
        """Every folder that is written; the first has the report."""

    def current(self) -> R | None:
        """Return the report of what is published, if that is what this run would publish."""

    def sweep_is_due(self) -> bool:
        """Tell whether files of an earlier state have been kept long enough, or a file is to be renewed."""

    def do(self, facts: RunFacts, watch: Callable[[], None]) -> None:
        """Do what is not done, unit by unit; ``watch`` raises to stop.

        Raises:
            IncompleteRunError: some of it is not done.
        """

    def publish(self, facts: RunFacts) -> None:
        """Check the counts and what was written, and make it the published state.

        Raises:
            IncompleteRunError: something is missing, or does not add up.
        """

    def report(self, facts: RunFacts, outcome: str, *, complete: bool) -> R:
        """Return what the run came to."""

    def page(self, report: R) -> bytes:
        """Return the page of a report."""

    def sweep(self) -> None:
        """Remove what the published state does not need and this project provably wrote."""


def refuse_taken(folders: Sequence[OwnedFolder]) -> None:
    """Refuse folders where a foreign file has a name that a run will write; reads only.

    Raises:
        OutputCollisionError: names the first; or a folder is another job's.
    """
    for folder in folders:
        folder.check_owner()
        refuse_foreign_lease(folder.storage, folder.uri)
        check_retired(folder.storage, folder.uri)
        folder.refuse_foreign((*folder.names, *REPORT_FILES))


def carry_out(work: Work[R], facts: RunFacts, stop: StopRequest | None) -> R:
    """Carry out a planned run, or say that there is nothing to do.

    Args:
        work: what is to be done.
        facts: what the run adds up; its time began with the planning.
        stop: asked between units whether to stop.

    Returns:
        The report that was written, or that of the run before if it was the same.

    Raises:
        OutputBusyError, OutputCollisionError: a folder is another's; nothing was written.
        Whatever the steps raise; then the report says so.
    """
    uris = [folder.uri for folder in work.folders]
    found = work.current()
    # A run that was cut off after it published has left its leases, and things to sweep.
    cut_off = any(is_leased(work.storage, uri) for uri in uris)
    whole = found is not None and report_is_whole(work.folders[0])
    if found is not None and whole and not cut_off and not work.sweep_is_due():
        return _nothing_to_do(found, uris[0])
    stop = stop or StopRequest()
    # What a signal raised may have been lost in foreign code while the run was planned.
    stop.check()
    with stop.deferred(), Leases(work.storage, uris) as leases:
        found = work.current()
        if found is not None:
            work.sweep()
            if not report_is_whole(work.folders[0]):
                restore_page(work.folders[0], work.page(found))
            return _nothing_to_do(found, uris[0])
        # All are looked at before the first is claimed: what is refused is left as it was.
        refuse_taken(work.folders)
        for folder in work.folders:
            folder.claim()
        for folder in work.folders:
            retract_report(folder)
        try:
            work.do(facts, make_watch(leases, stop))
            leases.check()
            work.publish(facts)
            report = work.report(facts, "complete", complete=True)
            write_report(work.folders[0], work.page(report), to_json(report))
        except (BgeRayError, Stopped) as error:
            if not leases.lost.is_set():
                _tell_failure(work, work.report(facts, f"incomplete: {error}", complete=False))
            raise
        work.sweep()
    return report


def _nothing_to_do(found: R, folder: str) -> R:
    logger.info("nothing to do: %s is up to date", folder)
    return dataclasses.replace(found, outcome="nothing to do")


def _tell_failure(work: Work[R], report: R) -> None:
    """Write the report of a failed run; what failed the run may refuse the report, too."""
    try:
        write_report(work.folders[0], work.page(report), to_json(report))
    except (StorageError, OutputCollisionError) as error:
        logger.error("no report of this run: %s", error)  # noqa: TRY400 - the run's own error follows
