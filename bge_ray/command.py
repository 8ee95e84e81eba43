"""The command line: `bge-ray <job>`, and `python jobs/<job>.py`, which is the same.

Nothing large is imported before signals are listened for, and no Ray or torch before the settings are read.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from bge_ray.ending import Ending
from bge_ray.logs import LogFormat
from bge_ray.pipeline.engine.stopping import Stopped

if TYPE_CHECKING:
    from typer import Typer
    from typer.core import TyperGroup

    from bge_ray.jobs import Job
    from bge_ray.settings.sections import Settings

NAME = "bge-ray"


@dataclass(frozen=True)
class Asked:
    """What the options say that every job has."""

    config: str | None
    overrides: tuple[str, ...]
    dry_run: bool
    print_config: bool
    log_format: LogFormat


def main() -> NoReturn:
    """Run `bge-ray` with the arguments of this process, and end with its exit code."""
    words = sys.argv[1:]
    named = next((word for word in words if not word.startswith("-")), NAME)
    sys.exit(_run(named, words, lambda ending: _invoke(_group(ending), words, NAME, ending)))


def script(name: str) -> NoReturn:
    """Run one job with the arguments of this process, as `python jobs/<name>.py` does, and end."""
    words = sys.argv[1:]
    sys.exit(
        _run(name, words, lambda ending: _invoke(_group(ending).commands[name], words, f"{name}.py", ending))
    )


def run_job(job: "Job", words: Sequence[str]) -> int:
    """Run a job with the given arguments; the last line of its log tells outcome, code and report place.

    Returns:
        The exit code: 0 done, 1 incomplete, 2 refused, 75 busy (`bge_ray.errors`), 128 + signal if stopped.
    """

    def dispatch(ending: Ending) -> int:
        from typer.main import get_command

        app = _app()
        _add_job(app, job, ending)
        return _invoke(get_command(app), words, job.name, ending)

    return _run(job.name, words, dispatch)


def _run(name: str, words: Sequence[str], dispatch: Callable[[Ending], int]) -> int:
    # The last line has the form that was asked for, also where it comes before the words are parsed.
    ending = Ending(name, "json" if "--log-format=json" in "=".join(words) else "text")
    with ending.listening():
        try:
            return dispatch(ending)
        except (Stopped, Exception) as error:  # noqa: BLE001 - it is told, and ends the process
            # While the command line was read, or what that takes was imported.
            return ending.conclude(error)


def _invoke(command: Any, words: Sequence[str], shown_as: str, ending: Ending) -> int:
    """Parse arguments and run what they ask for; wrong ones end with 2."""
    from bge_ray.errors import SettingsError
    from bge_ray.settings.credentials import refuse_credentials

    try:
        for word in words:  # first, because what is not understood is repeated
            refuse_credentials(word, word.partition("=")[0])
        command.main(args=list(words), prog_name=shown_as)
    except SettingsError as error:
        print(f"{shown_as}: {error}", file=sys.stderr)  # noqa: T201 - no log is configured yet
    except SystemExit as ended:
        if ending.code is not None:
            return ending.code
        if ended.code in (0, None):  # of --help and the like
            return 0
    return ending.refuse()


def _app() -> "Typer":
    from typer import Typer

    return Typer(
        name=NAME,
        help="Corpora to embeddings, a FAISS index and reranked runs: offline batch jobs on Ray.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )


def _group(ending: Ending) -> "TyperGroup":
    """Return the command with a subcommand a job."""
    from typer import Option
    from typer.main import get_group

    from bge_ray.jobs import JOBS

    app = _app()

    @app.callback()
    def shared(
        _version: Annotated[
            bool,
            Option("--version", callback=_tell_version, is_eager=True, help="Say which version this is."),
        ] = False,
    ) -> None:
        """Take what stands before a job."""

    for job in JOBS:
        _add_job(app, job, ending)
    _add_demo(app, ending)
    _add_compare(app, ending)
    _add_ask(app, ending)
    _add_changes(app, ending)

    @app.command("models", help="List the models that are known by card: what each makes, and what it takes.")
    def models() -> None:
        """Print the catalogue."""
        from bge_ray.model.catalogue import print_models

        with _while_read():
            print_models()

    @app.command("schema", help="Print the JSON schema of the settings, for editors.")
    def schema() -> None:
        from bge_ray.settings.schema import settings_schema

        with _while_read():
            print(json.dumps(settings_schema(), indent=1))  # noqa: T201 - the answer of the command

    return get_group(app)


@contextlib.contextmanager
def _while_read() -> Iterator[None]:
    """Print what is asked for until the reader has enough, as `head` has, which is no failure."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still held for it would be written when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell_version(wanted: bool) -> None:
    if wanted:
        from typer import Exit

        from bge_ray import __version__

        print(f"{NAME} {__version__}")  # noqa: T201 - the answer of the command
        raise Exit


def _config_option() -> Any:
    from typer import Option

    return Option(metavar="FILE_OR_URI", help="YAML file with settings, local or on any fsspec URI.")


def _set_option() -> Any:
    from typer import Option

    return Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; may be repeated.")


def _log_option() -> Any:
    from typer import Option

    return Option(help="Format of the log lines.")


def _add_job(app: "Typer", job: "Job", ending: Ending) -> None:
    from typer import Option

    epilog = _settings_epilog(job.reads)

    @app.command(job.name, help=job.says, epilog=epilog)
    def command(
        config: Annotated[list[str] | None, _config_option()] = None,
        overrides: Annotated[list[str] | None, _set_option()] = None,
        dry_run: Annotated[
            bool, Option("--dry-run", help="Say what would be done, and write nothing.")
        ] = False,
        print_config: Annotated[
            bool, Option("--print-config", help="Print the settled settings as YAML, and do nothing.")
        ] = False,
        log_format: Annotated[LogFormat, _log_option()] = "text",
        _version: Annotated[
            bool,
            Option("--version", callback=_tell_version, is_eager=True, help="Say which version this is."),
        ] = False,
    ) -> None:
        asked = Asked(_one(config), tuple(overrides or ()), dry_run, print_config, log_format)
        _run_here(job, asked, ending)


def _one(config: Sequence[str] | None) -> str | None:
    """Return the file with settings; of two the last would win, and nobody be told."""
    from bge_ray.errors import SettingsError

    if config is not None and len(config) > 1:
        raise SettingsError(
            f"--config: is given {len(config)} times ({', '.join(config)}); name one file, and put what "
            "differs into --set"
        )
    return config[0] if config else None


def _add_demo(app: "Typer", ending: Ending) -> None:
    from typer import Option

    from bge_ray.demo.job import SAYS, demo_job, demo_settings

    @app.command("demo", help=SAYS)
    def demo(
        work: Annotated[Path, Option(help="Folder for corpus and output.")] = Path("demo-out"),
        limit: Annotated[int, Option(min=1, help="Most passages to embed.")] = 2000,
        ask: Annotated[
            list[str] | None, Option(metavar="QUESTION", help="Ask this instead; may be repeated.")
        ] = None,
        train: Annotated[
            bool, Option("--train", help="Train a small reranker, in about an hour, and measure it.")
        ] = False,
        overrides: Annotated[list[str] | None, _set_option()] = None,
        dry_run: Annotated[
            bool, Option("--dry-run", help="Say what would be embedded; the corpus is written.")
        ] = False,
        log_format: Annotated[LogFormat, _log_option()] = "text",
    ) -> None:
        def made() -> tuple[str, ...]:
            return (*demo_settings(work, limit, ask or ()), *(overrides or ()))

        job = demo_job(work, ask or (), train=train)
        _run_here(job, Asked(None, (), dry_run, False, log_format), ending, made)


def _add_compare(app: "Typer", ending: Ending) -> None:
    from typer import Argument, Option

    from bge_ray.jobs import EVALUATE

    @app.command(
        "compare",
        help="Compare runs with the first: results in common, and by judgements which is better. The same as "
        "evaluate, with its settings as words.",
    )
    def compare(
        runs: Annotated[list[str], Argument(metavar="RUN...", help="Run files or folders.")],
        qrels: Annotated[str | None, Option(help="Judgements; without them results are compared.")] = None,
        output: Annotated[str | None, Option(help="Folder for tables and pictures.")] = None,
        k: Annotated[list[int] | None, Option("-k", help="A cut-off; may be repeated.")] = None,
        overrides: Annotated[list[str] | None, _set_option()] = None,
        dry_run: Annotated[bool, Option("--dry-run", help="Say what would be read and written.")] = False,
        log_format: Annotated[LogFormat, _log_option()] = "text",
    ) -> None:
        asked = {"run": runs, "qrels": qrels, "output": output, "k": k}
        words = [f"evaluate.{key}={json.dumps(value)}" for key, value in asked.items() if value is not None]
        _run_here(EVALUATE, Asked(None, (*words, *(overrides or ())), dry_run, False, log_format), ending)


def _add_ask(app: "Typer", ending: Ending) -> None:
    from typer import Argument, Option

    @app.command(
        "ask",
        help="Ask a data set questions, in this process: the first takes seconds, the others do not. Without "
        "questions, lines of standard input are asked.",
    )
    def ask(
        dataset: Annotated[str, Argument(metavar="DATASET", help="Folder of the data set (output.uri).")],
        questions: Annotated[list[str] | None, Argument(metavar="QUESTION...")] = None,
        k: Annotated[int, Option("-k", min=1, help="Passages a question.")] = 5,
        column: Annotated[
            list[str] | None, Option(help="Show this kept column, too; may be repeated.")
        ] = None,
        rescore: Annotated[
            int | None,
            Option(min=0, help="Candidates to score again from stored vectors, else as tuned."),
        ] = None,
        nprobe: Annotated[
            int | None,
            Option(min=1, help="Inverted lists to look into (efSearch of a graph), else as tuned."),
        ] = None,
        condition: Annotated[
            str | None,
            Option("--filter", metavar="SQL", help="Condition over kept columns that passages pass."),
        ] = None,
        stale_index: Annotated[
            bool, Option("--stale-index", help="Ask an index that lacks passages, too; they are not found.")
        ] = False,
        model: Annotated[str | None, Option(help="Where the model lies, if not where it lay.")] = None,
        device: Annotated[str, Option(help="Device on which questions are encoded.")] = "cpu",
        as_json: Annotated[bool, Option("--json", help="A line of JSON a passage.")] = False,
        log_format: Annotated[LogFormat, _log_option()] = "text",
    ) -> None:
        def work() -> str:
            from bge_ray import ask as asking

            asked = asking.Asked(k, tuple(column or ()), rescore, nprobe, condition, as_json, stale_index)
            with _while_read():
                asking.ask(dataset, questions or (), asked, model=model, device=device)
            return ""

        ending.configure(log_format)
        ending.run(work, lambda: None)


def _add_changes(app: "Typer", ending: Ending) -> None:
    from typer import Option

    from bge_ray.changes import SAYS, changes_job

    @app.command("changes", help=SAYS, epilog=_settings_epilog(("output.uri", "output.storage_timeout_s")))
    def changes(
        since: Annotated[int, Option(min=0, help="Number of the change that is known; 0: none.")] = 0,
        output: Annotated[
            str | None,
            Option(
                metavar="FILE_OR_URI", help="Write this file (.parquet, else JSON lines); default: to stdout."
            ),
        ] = None,
        config: Annotated[list[str] | None, _config_option()] = None,
        overrides: Annotated[list[str] | None, _set_option()] = None,
        dry_run: Annotated[bool, Option("--dry-run", help="Write no file, and tell all on stdout.")] = False,
        log_format: Annotated[LogFormat, _log_option()] = "text",
    ) -> None:
        asked = Asked(_one(config), tuple(overrides or ()), dry_run, False, log_format)
        _run_here(changes_job(since, output), asked, ending)


def _settings_epilog(reads: Sequence[str]) -> str | None:
    if not reads:
        return None
    from bge_ray.settings.sections import settings_help

    # \b keeps lines as they are.
    return "\b\nsettings (YAML sections, or --set):\n" + settings_help(reads)


def _run_here(
    job: "Job", asked: Asked, ending: Ending, more: Callable[[], Sequence[str]] = lambda: ()
) -> int:
    """Run a job in this process, which is its own; the last line of its log tells how it ended.

    Args:
        job: what to run.
        asked: by the options.
        ending: of this process.
        more: makes further overrides, once everything is listened for.

    Returns:
        The exit code, which the ending has, too.
    """
    from bge_ray.report.start import count_from_process
    from bge_ray.run_id import run_id

    ending.configure(asked.log_format)
    if not asked.print_config:
        ending.tell(f"run {run_id()}")
    count_from_process()
    settings: list[Settings] = []

    def work() -> str:
        from bge_ray.settings.sections import parse_settings

        document = _read_config(asked.config) if asked.config else None
        overrides = [*more(), *asked.overrides]
        settings.append(parse_settings(document, overrides, asked.config or "the command line"))
        if asked.print_config:
            from bge_ray.settings.shown import to_yaml

            return to_yaml(settings[0]).rstrip("\n")
        from bge_ray.pipeline.engine.cluster import prepare_environment

        prepare_environment(settings[0].resources)
        return job.action(settings[0], asked.dry_run, ending.stop)

    def place() -> str | None:
        if asked.dry_run or asked.print_config or job.report is None:
            return None
        return _place(settings[0], job.report)

    return ending.run(work, place)


def _read_config(uri: str) -> str:
    from bge_ray.errors import SettingsError
    from bge_ray.storage.objects import Storage

    content = Storage().read_optional(uri)
    if content is None:
        raise SettingsError(f"--config {uri}: no such file or object")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise SettingsError(f"--config {uri}: is not UTF-8: {error}") from error


def _place(settings: "Settings", report: str) -> str | None:
    from bge_ray.storage.objects import join

    key, _, name = report.partition("/")
    section, _, setting = key.partition(".")
    folder = getattr(getattr(settings, section), setting)
    return join(str(folder), name) if folder else None


if __name__ == "__main__":
    main()
