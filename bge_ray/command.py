"""The command line that all jobs share: arguments, settings, logging, signals, exit code."""

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Callable

from bge_ray.errors import BgeRayError, SettingsError, StorageAccessError
from bge_ray.pipeline.engine.cluster import disconnect, prepare_environment
from bge_ray.pipeline.engine.stopping import Stopped, StopRequest
from bge_ray.report.start import count_from_process
from bge_ray.run_id import run_id
from bge_ray.settings.sections import Settings, parse_settings, refuse_credentials, settings_help
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.reports import last_report

logger = logging.getLogger("bge_ray")

Job = Callable[[Settings, bool, StopRequest], str]
OUTCOMES = {0: "done", 1: "incomplete", 2: "refused", 75: "busy"}


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


def run_job(
    name: str,
    description: str,
    job: Job,
    argv: list[str] | None = None,
    report: str | None = None,
) -> int:
    """Run a job from its command line; the last line of its log tells outcome, exit code and report place.

    Args:
        name: of the job, for messages.
        description: first line of ``--help``.
        job: takes the settings, whether this is a dry run, and the stop request that signals reach;
            returns the last line to print.
        argv: arguments; those of the process if None.
        report: where its report is, as the key of a folder and a name in it: "output.uri/report.html".

    Returns:
        The exit code: 0 done, 1 incomplete, 2 refused, 75 busy (`bge_ray.errors`), 128 + signal if stopped.
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
    words = sys.argv[1:] if argv is None else argv
    try:
        for word in words:  # first, because argparse repeats what it does not know
            refuse_credentials(word, word.partition("=")[0])
    except SettingsError as error:
        parser.error(str(error))
    arguments = parser.parse_args(words)
    _configure_logging(arguments.log_format)
    logger.info("%s: run %s", name, run_id())
    count_from_process()
    stop = StopRequest()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    place, may_have_written = None, False
    try:
        prepare_environment()
        document = _read_config(arguments.config) if arguments.config else None
        settings = parse_settings(document, arguments.overrides, arguments.config or "the command line")
        place = None if arguments.dry_run or report is None else _place(settings, report)
        print(job(settings, arguments.dry_run, stop), flush=True)  # noqa: T201 - the answer of the command
        code = 0
    except BgeRayError as error:
        logger.error("%s: %s", name, error)  # noqa: TRY400 - the message is the whole story
        code, may_have_written = error.exit_code, isinstance(error, StorageAccessError)
    except (Stopped, Exception):
        # What a signal raises may be lost in foreign code, as in Ray's, which then raises something else.
        if (stopped := stop.pending()) is not None:
            logger.warning("%s: stopped by %s; run it again to continue", name, stopped)
            code = stopped.exit_code
        else:
            logger.exception("%s: an error that no one foresaw", name)
            code = 1
    finally:
        with stop.deferred():
            disconnect()
    outcome = OUTCOMES.get(code, "stopped")
    # A run that failed tells of a report only if it has come to write one: an older one is of another run.
    told = place if code == 0 else last_report()
    if code in (2, 75) and not told and not may_have_written:
        outcome += ", nothing was written"
    where = f"; report at {told}" if told else ""
    logger.info("%s: %s; exit code %d%s", name, outcome, code, where)
    return code


def _read_config(uri: str) -> str:
    content = Storage().read_optional(uri)
    if content is None:
        raise SettingsError(f"--config {uri}: no such file or object")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise SettingsError(f"--config {uri}: is not UTF-8: {error}") from error


def _place(settings: Settings, report: str) -> str | None:
    key, _, name = report.partition("/")
    section, _, setting = key.partition(".")
    folder = getattr(getattr(settings, section), setting)
    return join(str(folder), name) if folder else None


def _configure_logging(log_format: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    # Libraries and Python's own warnings go the same way, so that all lines are of one form.
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    logging.getLogger("bge_ray").setLevel(logging.INFO)
