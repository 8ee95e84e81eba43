"""What a line of a command's log looks like, as text or as JSON."""

import json
import logging
import sys
import time
from typing import Literal, TypeAlias

from bge_ray.run_id import run_id

LogFormat: TypeAlias = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the run it is of and, where it is about one, the work unit."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON, with the traceback if there is one."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "run_id": run_id(),
        }
        if (unit := getattr(record, "unit", None)) is not None:
            entry["unit"] = unit
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def formatter(log_format: LogFormat) -> logging.Formatter:
    """Return what makes the lines."""
    if log_format == "json":
        return JsonFormatter()
    return logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")


def configure_logging(log_format: LogFormat) -> None:
    """Send all lines to standard error, in one form; for a process that is a command's own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(log_format))
    # Libraries and Python's own warnings go the same way, so that all lines are of one form.
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    logging.getLogger("bge_ray").setLevel(logging.INFO)
