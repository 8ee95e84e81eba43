"""The migrate job: a new model beside the one in use, compared on the user's queries, then one step to it.

It is the embed, index, search and evaluate jobs in a row, each of which does only what is not done; the one
thing that it adds is the pointer, and the question whether to move it.
"""

import logging
import time
from pathlib import Path
from typing import Any

from bge_ray.dataset.folder import read_complete
from bge_ray.dataset.pointer import Pointer, Seen, move, read_pointer, refuse_pointer
from bge_ray.errors import DatasetMismatchError, SettingsError, WorseModelError
from bge_ray.formats.qrels import read_qrels
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.records.canonical import to_json
from bge_ray.records.migration import Migration, Side
from bge_ray.records.reports import EmbedReport, read_report
from bge_ray.report.metrics_page import to_markdown
from bge_ray.report.migration_page import migration_page
from bge_ray.settings.sections import ModelSettings, Settings
from bge_ray.storage.folders import refuse_collisions, same_place
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder

logger = logging.getLogger(__name__)

FILES = ("migration.json", "migration.md")


def migrate(settings: Settings, stop: StopRequest | None = None) -> str:
    """Make the new data set, compare it with the one in use, and move the pointer if that is asked for.

    Args:
        settings: needs migrate.pointer, migrate.output and what embed needs; search.queries if there is a
            data set to compare with. With migrate.back it needs migrate.pointer alone.
        stop: a request to stop, for the jobs that this one consists of.

    Returns:
        What came of it, in lines.

    Raises:
        SettingsError: a setting is missing, or the folders do not go together; nothing was written.
        WorseModelError: the loss is greater than migrate.max_loss; the pointer is where it was.
        TakenOverError: somebody else moved the pointer meanwhile.
        BgeRayError: what the jobs raise.
    """
    storage = Storage(settings.output.storage_timeout_s)
    if settings.migrate.back:
        return _move_back(storage, settings)
    seen, old = _inputs(storage, settings)
    from bge_ray.pipeline.embed.job import embed
    from bge_ray.pipeline.index.job import index_outcome

    asked, root = settings.migrate, _lasting(str(settings.output.uri))
    stop = stop or StopRequest()
    embed(settings, stop)
    if settings.index.build:
        logger.info("%s", index_outcome(settings, stop))
    metrics = None if old is None else _compare(settings, old, root, stop)
    if asked.move:
        _refuse_worse(settings, metrics)
        if seen.pointer is None or not same_place(seen.pointer.dataset, root):
            _move(storage, str(asked.pointer), seen, root)
    found = Migration(
        pointer=str(asked.pointer),
        leads_to=root if asked.move else None if seen.pointer is None else seen.pointer.dataset,
        old=None if old is None else _side(storage, old),
        new=_side(storage, root),
        compared=None if metrics is None else join(str(asked.output), "compared"),
    )
    page = migration_page(found, None if metrics is None else to_markdown(metrics))
    folder = _folder(storage, settings)
    for name, data in zip(FILES, (to_json(found), page.encode()), strict=True):
        folder.put(name, data)
    return page


def plan_migrate(settings: Settings) -> str:
    """Say what `migrate` would do, without writing anything (``--dry-run``)."""
    storage = Storage(settings.output.storage_timeout_s)
    if settings.migrate.back:
        _, pointer, before = _way_back(storage, settings)
        if pointer.back_from is not None:
            return _is_back(settings, pointer)
        return f"{settings.migrate.pointer}: from {pointer.dataset} back to {before}"
    seen, old = _inputs(storage, settings)
    from bge_ray.pipeline.embed.job import plan_only

    lines = plan_only(settings).lines()
    lines.append(f"then compared with {old}" if old else "there is no data set to compare with")
    leads = "nowhere" if seen.pointer is None else f"to {seen.pointer.dataset}"
    will = "would be moved" if settings.migrate.move else "stays"
    lines.append(f"{settings.migrate.pointer} leads {leads}, and {will}")
    return "\n".join(lines)


def _inputs(storage: Storage, settings: Settings) -> tuple[Seen, str | None]:
    """Return the pointer, and the data set to compare with, once all is known to be there; reads only."""
    settings.require("migrate.pointer", "migrate.output", "corpus.uri", "output.uri")
    asked, root = settings.migrate, str(settings.output.uri)
    refuse_pointer(storage, root, "output.uri")
    refuse_pointer(storage, asked.compare_with, "migrate.compare_with")
    if settings.search.output is not None:
        raise SettingsError("search.output: both runs lie below migrate.output; leave it out")
    refuse_collisions(
        {"migrate.pointer": asked.pointer, "migrate.output": asked.output, "output.uri": root},
        {"corpus.uri": settings.corpus.uri, "search.queries": settings.search.queries},
        {"evaluate.qrels": settings.evaluate.qrels, "migrate.compare_with": asked.compare_with},
    )
    if storage.info(join(str(asked.pointer), "dataset.json")) is not None:
        raise SettingsError(
            f"migrate.pointer {asked.pointer}: is a data set; choose another folder, which those who "
            "search take from now on"
        )
    seen = read_pointer(storage, str(asked.pointer))
    old = asked.compare_with
    if old is None and seen.pointer is not None:
        # Also when it was moved already, by this run before it was broken off.
        moved = same_place(seen.pointer.dataset, root)
        old = seen.pointer.before if moved else seen.pointer.dataset
    if old is not None and same_place(old, root):
        raise SettingsError(f"migrate.compare_with {old}: is output.uri itself")
    if old is not None:
        from bge_ray.evaluate import check_qrels

        settings.require("search.queries")
        read_complete(storage, old)
        queries, qrels = str(settings.search.queries), settings.evaluate.qrels
        if not storage.list_files(queries):
            raise SettingsError(f"search.queries {queries}: is not there, or is an empty folder")
        if qrels is not None:
            check_qrels(storage, qrels)
            read_qrels(storage, qrels)
    if asked.max_loss is not None and (old is None or settings.evaluate.qrels is None):
        raise SettingsError(
            "migrate.max_loss: a loss is measured by evaluate.qrels, against a data set that is in use or "
            "migrate.compare_with; set them, or leave it out"
        )
    _folder(storage, settings).refuse_foreign(FILES)
    return seen, old


def _folder(storage: Storage, settings: Settings) -> OwnedFolder:
    return OwnedFolder(storage, str(settings.migrate.output), "migrate", "migrate.output", FILES)


def _compare(settings: Settings, old: str, new: str, stop: StopRequest) -> dict[str, Any]:
    """Answer the queries from both data sets, and return what evaluate says of the runs."""
    from bge_ray.evaluate import evaluate
    from bge_ray.pipeline.search.job import search

    runs = []
    for name, root in (("old", old), ("new", new)):
        there = _reading(settings, root, join(str(settings.migrate.output), name))
        search(there, stop)
        runs.append(str(there.search.output))
    asked = {"run": tuple(runs), "output": join(str(settings.migrate.output), "compared")}
    return evaluate(settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update=asked)}))


def _reading(settings: Settings, root: str, output: str) -> Settings:
    """Return the settings of a search of one data set, by its own model and its index if it has one."""
    from bge_ray.pipeline.index.published import read_index

    asked: dict[str, Any] = {"output": output}
    if read_index(Storage(settings.output.storage_timeout_s), root) is None:
        asked["exact"] = True
    kept = {name: getattr(settings.model, name) for name in ("dtype", "trust_remote_code")}
    return settings.model_copy(
        update={
            "model": ModelSettings(**kept),
            "output": settings.output.model_copy(update={"uri": root}),
            "search": settings.search.model_copy(update=asked),
        }
    )


def _refuse_worse(settings: Settings, metrics: dict[str, Any] | None) -> None:
    allowed = settings.migrate.max_loss
    if allowed is None or metrics is None:
        return
    name = metrics["shown_metric"]
    # Judged queries that neither run answers, not asked perhaps, would make any loss small.
    answered = metrics["queries"] - min(run["unanswered"] for run in metrics["runs"])
    share = metrics["queries"] / max(1, answered)
    old, new = (share * run["mean"][name] for run in metrics["runs"])
    if old - new > allowed:
        raise WorseModelError(
            f"{settings.migrate.pointer}: was not moved: {name} of {settings.output.uri} is {new:.4f}, "
            f"{old - new:.4f} below {old:.4f} over {answered:,} judged queries with an answer, and "
            f"migrate.max_loss is {allowed:g}; see "
            f"{join(str(settings.migrate.output), 'compared', 'metrics.md')}"
        )


def _side(storage: Storage, root: str) -> Side:
    from bge_ray.pipeline.index.published import read_index

    spec, manifest = read_complete(storage, root)
    index = read_index(storage, root)
    report = read_report(EmbedReport, storage.read_optional(join(root, "report.json")))
    return Side(
        dataset=root,
        model=spec.model.name,
        dim=spec.model.dim,
        vectors=manifest.vectors,
        index=None if index is None else index.factory,
        recall=None if index is None else index.tuned_recall.value,
        embed_s=None if report is None else report.wall_s,
        embed_cost=None if report is None else report.cost,
        embed_tokens=None if report is None else report.tokens_encoded,
    )


def _move_back(storage: Storage, settings: Settings) -> str:
    seen, pointer, before = _way_back(storage, settings)
    if pointer.back_from is not None:
        return _is_back(settings, pointer)
    _move(storage, str(settings.migrate.pointer), seen, before, back=True)
    return f"{settings.migrate.pointer} leads to {before} again, no longer to {pointer.dataset}"


def _is_back(settings: Settings, pointer: Pointer) -> str:
    return (
        f"nothing to do: {settings.migrate.pointer} leads to {pointer.dataset}, where it was led back to "
        f"from {pointer.back_from}"
    )


def _way_back(storage: Storage, settings: Settings) -> tuple[Seen, Pointer, str]:
    """Return the pointer, and where the way back leads, where there still is a data set; reads only."""
    settings.require("migrate.pointer")
    where = f"migrate.pointer {settings.migrate.pointer}"
    seen = read_pointer(storage, str(settings.migrate.pointer))
    if seen.pointer is None or seen.pointer.before is None:
        raise SettingsError(f"{where}: led nowhere before")
    if seen.pointer.back_from is not None:  # a rerun of a way back, which it must not undo
        return seen, seen.pointer, seen.pointer.dataset
    try:
        read_complete(storage, seen.pointer.before)
    except SettingsError as error:
        raise DatasetMismatchError(f"{where}: stays, because where it led before is gone: {error}") from error
    return seen, seen.pointer, seen.pointer.before


def _move(storage: Storage, folder: str, seen: Seen, root: str, *, back: bool = False) -> None:
    before = None if seen.pointer is None else seen.pointer.dataset
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    to = Pointer(_lasting(root), before, now, back_from=before if back else None)
    move(storage, folder, seen, to)


def _lasting(uri: str) -> str:
    """Return a path that means the same from any folder."""
    return uri if "://" in uri else str(Path(uri).absolute())
