"""The name of what this process is doing, by which its log lines, metrics and report are found together."""

import functools
import secrets
import time


@functools.cache
def run_id() -> str:
    """Return the run id of this process: the time of the first call, and a few random digits."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}"
