"""The command line that all jobs share: arguments, settings, logging, signals, exit code."""

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Callable

from bge_ray.errors import BgeRayError
from bge_ray.io.storage import Storage
from bge_ray.pipeline.cluster import disconnect, prepare_environment
from bge_ray.pipeline.stopping import Stopped, StopRequest
from bge_ray.settings import Settings, parse_settings, settings_help

logger = logging.getLogger("bge_ray")

Job = Callable[[Settings, bool, StopRequest], str]


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON, with the traceback if there is one."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def run_job(name: str, description: str, job: Job, argv: list[str] | None = None) -> int:
    """Run a job from its command line.

    Args:
        name: of the job, for messages.
        description: first line of ``--help``.
        job: takes the settings, whether this is a dry run, and the stop request that signals reach;
            returns the last line to print.
        argv: arguments; those of the process if None.

    Returns:
        The exit code: 0 done, 1 incomplete, 2 settings or input wrong, 128 + signal if stopped.
    """
    parser = argparse.ArgumentParser(
        prog=f"{name}.py",
        description=description,
        epilog="settings (YAML sections, or --set):\n" + settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE_OR_URI", help="YAML file with settings, local or on any fsspec URI"
    )
    parser.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override one setting",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    parser.add_argument(
        "--log-format", choices=["text", "json"], default="text", help="format of the log lines"
    )
    arguments = parser.parse_args(argv)
    _configure_logging(arguments.log_format)
    stop = StopRequest()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        prepare_environment()
        document = Storage().read(arguments.config).decode() if arguments.config else None
        settings = parse_settings(document, arguments.overrides, arguments.config or "the command line")
        print(job(settings, arguments.dry_run, stop))  # noqa: T201 - the answer of the command
    except BgeRayError as error:
        logger.error("%s: %s", name, error)  # noqa: TRY400 - the message is the whole story
        return error.exit_code
    except Stopped as stopped:
        logger.warning("%s: stopped by %s; run it again to continue", name, stopped)
        return stopped.exit_code
    finally:
        disconnect()
    return 0


def _configure_logging(log_format: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger("bge_ray")
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False
