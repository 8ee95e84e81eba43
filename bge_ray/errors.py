"""Every error this package raises on purpose, each with the exit code its job ends with.

    BgeRayError
      SettingsError         2   a setting is unknown, of the wrong type or impossible
      CorpusError           2   the input cannot be read or lacks what the settings name
      ModelError            2   a model cannot be loaded, or its folder is not what it claims
      InstallationError     2   a package is missing, or two stand in each other's way
      DatasetMismatchError  2   the output holds a data set made with other settings, or damaged
      OutputCollisionError  2   the output is another job's, or holds a file that this project did not write
      OutputBusyError      75   another run is writing this output: try again later
      StorageError          1   a storage operation failed and may not the next time
        StorageAccessError  2   the store refuses, and would again: bucket, access, credentials, protocol
        DamagedShardError   2   an embedding shard is not the one that was written
      DamagedFileError      2   what the two named Damaged... have in common: no rerun mends them
      TakenOverError        1   a newer run owns the output; this one stopped writing
      IncompleteRunError    1   the run ended with work left undone: run it again to continue
      RejectedRowsError     2   more rows were rejected than the settings allow
      IndexBuildError       1   an index input or part is not what its description says
        DamagedIndexError   2   a file of a published index is missing, or not the one that was written
      RecallError           1   the index was built and published, and misses its recall target

Exit code 2 means that no rerun mends it, 1 that running again may, 75 that running again later will. This
module knows nothing of the others.
"""

import re


class BgeRayError(Exception):
    """Base of all errors raised on purpose; anything else that escapes is a defect."""

    exit_code = 1


class SettingsError(BgeRayError):
    """A setting is unknown, of the wrong type, impossible, or missing."""

    exit_code = 2


class CorpusError(BgeRayError):
    """The corpus cannot be read, is empty, or lacks a column the settings name."""

    exit_code = 2


class ModelError(BgeRayError):
    """A model cannot be loaded or is not usable as the settings ask."""

    exit_code = 2


class InstallationError(BgeRayError):
    """A package that the job needs is missing, broken, or overwritten by another."""

    exit_code = 2


class DatasetMismatchError(BgeRayError):
    """The data set that is there has another fingerprint, or a file of it is damaged, missing or not ours."""

    exit_code = 2


class OutputCollisionError(BgeRayError):
    """An output folder is another job's or an input, or a name in it is taken by a file that is not ours."""

    exit_code = 2


class OutputBusyError(BgeRayError):
    """Another live run holds the output."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, by which schedulers know to try again


class StorageError(BgeRayError):
    """A storage operation failed and retrying did not help."""


class StorageAccessError(StorageError):
    """The store refuses: no such bucket, no access, no credentials, no client for it, or it is read-only."""

    exit_code = 2


class DamagedFileError(BgeRayError):
    """A published file is not the one that was written; the way out is part of its text."""

    exit_code = 2
    way_out = ""

    def __init__(self, uri: str, found: str) -> None:
        """Name the file, and what it is instead."""
        super().__init__(uri, found)
        self.uri, self.found = uri, found

    def __str__(self) -> str:
        return f"{self.uri}: {self.found}; {self.way_out}"


class DamagedShardError(DamagedFileError, StorageError):
    """An embedding shard is not the one that the manifest vouches for."""

    way_out = "remove it and run bge-ray embed again to make it anew"


class TakenOverError(BgeRayError):
    """A newer run took the output over while this one was out of touch."""


class IncompleteRunError(BgeRayError):
    """Some work units are not done."""


class RejectedRowsError(BgeRayError):
    """The rejected fraction exceeds ``corpus.max_rejected_fraction``."""

    exit_code = 2


class IndexBuildError(BgeRayError):
    """Vectors, ids, a trained index or an index part break a rule that FAISS would not check."""


class DamagedIndexError(DamagedFileError, IndexBuildError):
    """A file of a published index is missing, or not the one that was written."""

    way_out = "run bge-ray index with index.verify, which makes it anew, or search without it (search.exact)"


class RecallError(BgeRayError):
    """The published index does not reach ``index.recall_target``."""


class WorseModelError(BgeRayError):
    """A new data set answers worse than ``migrate.max_loss`` allows; the pointer was not moved."""

    exit_code = 2


def in_a_line(error: Exception) -> str:
    """Return what a library says, without a terminal's colours and the advice below its first line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
