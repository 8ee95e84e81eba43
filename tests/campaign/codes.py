"""Exit codes of runs: which may be, after what was done to a run."""

import signal

DONE, INCOMPLETE, REFUSED, BUSY = 0, 1, 2, 75
# How Python tells of a process that a signal ended, beside the code of a job that ended by one.
KILLED = -signal.SIGKILL
TERMINATED = (128 + signal.SIGTERM, -signal.SIGTERM)


def check_code(code: int, struck: set[str], moved_away: list[str]) -> list[str]:
    """Return what is wrong with an exit code.

    Args:
        code: of the process of a job.
        struck: kinds of blows that fell on the run.
        moved_away: the foreign files in the way that its log names.
    """
    if code in (DONE, INCOMPLETE, BUSY):
        return []
    if code == KILLED and "driver" in struck:
        return []
    if code in TERMINATED and "sigterm" in struck:
        return []
    if code == REFUSED and moved_away:
        return []
    why = ", ".join(sorted(struck)) or "nothing"
    return [
        f"exit code {code}, after {why} was struck and with no foreign file in the way that its log names"
    ]
