"""Who is measured: encoders by each way of searching, rerankers alone and behind each encoder."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bge_ray.errors import ModelError, SettingsError
from bge_ray.model.cards import find_card
from bge_ray.model.source import base_name, is_hub_id
from bge_ray.model.spec import resolve_encoder, resolve_reranker
from bge_ray.pipeline.engine.pools import device_of, encoder_request, reranker_request
from bge_ray.pipeline.mteb.rules import Rules, settle_rules
from bge_ray.pipeline.mteb.tasks import RERANKING, searches
from bge_ray.records.canonical import digest
from bge_ray.records.model import EMBEDDING, ModelSpec
from bge_ray.records.reports import Contestant
from bge_ray.settings.sections import ModelSettings, RerankSettings, Settings

FORMAT_VERSION = 1
REVISION_LETTERS = 16
# What decides where and how fast, and never a result.
_UNDECISIVE = {"uri", "storage_timeout_s", "max_removed_fraction", "grace_s", "reuse", "compression"}


@dataclass(frozen=True)
class Encoder:
    """A model to be measured: as it was asked for, as it was resolved, and by which rules.

    ``raw`` is the model for tasks that are not searched: their authors may not normalise its vectors there.
    """

    asked: ModelSettings
    spec: ModelSpec
    raw: ModelSpec
    rules: Rules
    note: str | None


@dataclass(frozen=True)
class Entrant:
    """A contestant with all that it takes to measure it."""

    name: str
    revision: str
    encoder: Encoder | None
    reranker: ModelSpec | None
    reranking: RerankSettings | None
    search: Literal["exact", "index"]

    def takes(self, task: Any) -> bool:
        """Tell whether it can do a task; what another contestant would do alike is left to that one."""
        if task.is_aggregate:
            return all(self.takes(part) for part in task.metadata.tasks)
        given = task.metadata.type in RERANKING
        if self.encoder is None:
            return given
        if self.reranker is not None or self.search == "index":
            return searches(task) and not given
        return True

    def described(self) -> Contestant:
        """Return it as a report has it."""
        spec = self.encoder.raw if self.encoder is not None else self.reranker
        if spec is None:
            raise AssertionError(f"{self.name}: is neither an encoder nor a reranker")
        return Contestant(
            name=self.name,
            revision=self.revision,
            model=self.encoder.spec.name if self.encoder is not None else None,
            reranker=self.reranker.name if self.reranker is not None else None,
            search=self.search if self.encoder is not None else None,
            dtype=spec.dtype,
            max_length=spec.max_length,
            note=self.encoder.note if self.encoder is not None else None,
        )

    @property
    def card_id(self) -> str | None:
        """The id of the published model that it is, searched exactly and not reranked; None: none."""
        if self.encoder is None or self.reranker is not None or self.search != "exact":
            return None
        card = find_card(self.encoder.spec.name)
        return card.id if card is not None else None


def plan_entrants(settings: Settings, tasks: Sequence[Any]) -> tuple[Entrant, ...]:
    """Return who is measured, each of whom can do one of the tasks.

    Devices decide dtypes, so a cluster is joined or started where the settings leave that open.

    Raises:
        SettingsError: a model can do none of the tasks, or no model can do one of them.
        ModelError: a model is not to be had, or not what it is named as.
    """
    asked = settings.mteb
    names = asked.models or (() if asked.rerankers else (settings.model.name,))
    encoders = [_encoder(settings, name) for name in names]
    rerankers = [_reranker(settings, name) for name in asked.rerankers]
    found = [_entrant(settings, encoder, None, search) for encoder in encoders for search in asked.searches]
    for reranker in rerankers:
        found += [_entrant(settings, None, reranker, "exact")]
        found += [_entrant(settings, encoder, reranker, "exact") for encoder in encoders]
    _refuse_idle(found, tasks, [*names, *asked.rerankers])
    able = tuple(entrant for entrant in found if any(map(entrant.takes, tasks)))
    labels = [(entrant.name, entrant.revision) for entrant in able]
    twice = next((name for name, revision in labels if labels.count((name, revision)) > 1), None)
    if twice is not None:
        raise SettingsError(f"mteb.models: two of them are one: {twice}, with the same weights and settings")
    return able


def _encoder(settings: Settings, name: str) -> Encoder:
    revision = settings.model.revision if name == settings.model.name else None
    changes = {"name": name, "revision": revision, "outputs": (EMBEDDING,)}
    asked = settings.model.model_copy(update=changes)
    on_gpu = device_of(settings, encoder_request(settings, 1), lambda: None) == "cuda"
    try:
        resolve_reranker(
            settings.rerank.model_copy(update={"model": name, "revision": revision}), on_gpu=False
        )
    except ModelError:
        spec = resolve_encoder(asked, on_gpu=on_gpu).only(EMBEDDING)
    else:
        raise SettingsError(
            f"mteb.models: {name} is a reranker, which makes no vectors; name it in mteb.rerankers"
        )
    rules, note = settle_rules(settings.mteb.rules, spec)
    raw = spec
    if settings.mteb.rules == "baai" and settings.model.normalize == "auto" and find_card(name) is not None:
        raw = dataclasses.replace(spec, normalize=rules.evaluation.normalize)
    return Encoder(asked, dataclasses.replace(spec, normalize=True), raw, rules, note)


def _reranker(settings: Settings, name: str) -> tuple[ModelSpec, RerankSettings]:
    revision = settings.rerank.revision if name == settings.rerank.model else None
    asked = settings.rerank.model_copy(update={"model": name, "revision": revision})
    on_gpu = device_of(settings, reranker_request(settings, 1), lambda: None) == "cuda"
    return resolve_reranker(asked, on_gpu=on_gpu), asked


def _entrant(
    settings: Settings,
    encoder: Encoder | None,
    reranker: tuple[ModelSpec, RerankSettings] | None,
    search: Literal["exact", "index"],
) -> Entrant:
    spec, asked = reranker if reranker is not None else (None, None)
    names = [one.name for one in (encoder.spec if encoder is not None else None, spec) if one is not None]
    ways = {"exact": "", "index": "+index"}
    name = _published_as(names[0]) + "".join(f"+{_published_as(one).rpartition('/')[2]}" for one in names[1:])
    decisive = digest(
        "mteb",
        FORMAT_VERSION,
        None if encoder is None else _key(encoder.raw),
        None if encoder is None else encoder.rules.evaluation.model_dump(mode="json"),
        None if encoder is None else [encoder.rules.kind, encoder.rules.query, encoder.rules.document],
        None if encoder is None else encoder.rules.prompts,
        None if encoder is None else settings.chunking.model_dump(mode="json"),
        settings.output.dtype,
        search,
        settings.index.model_dump(mode="json", exclude={"build", "verify"}) if search == "index" else None,
        [settings.search.nprobe, settings.search.rescore] if search == "index" else None,
        None if spec is None or asked is None else [_key(spec), asked.depth, asked.reads],
    )
    return Entrant(name + ways[search], decisive[:REVISION_LETTERS], encoder, spec, asked, search)


def _key(spec: ModelSpec) -> dict[str, Any]:
    """Return all of a model that decides what it makes."""
    return dataclasses.asdict(dataclasses.replace(spec, name="", revision=None))


def _published_as(name: str) -> str:
    """Return a hub id as it is, and a folder or URI by its last name: its place says nothing of it."""
    return name if is_hub_id(name) else f"local/{base_name(name)}"


def _refuse_idle(entrants: Sequence[Entrant], tasks: Sequence[Any], names: Sequence[str]) -> None:
    """Refuse a model that has nothing to do, and a task that nobody does."""
    for task in tasks:
        if not any(entrant.takes(task) for entrant in entrants):
            what = "candidates of queries" if searches(task) else "vectors"
            raise SettingsError(
                f"mteb: none of {', '.join(names)} can do {task.metadata.name}, a task of the type "
                f"{task.metadata.type}, which takes {what}; name an encoder in mteb.models"
            )
    for name in names:
        own = [
            entrant
            for entrant in entrants
            if name
            in (getattr(entrant.reranker, "name", None), entrant.encoder and entrant.encoder.asked.name)
        ]
        if not any(entrant.takes(task) for entrant in own for task in tasks):
            kinds = ", ".join(sorted({task.metadata.type for task in tasks}))
            raise SettingsError(
                f"mteb.rerankers: {name} can do none of the tasks, which are of the type {kinds}; a reranker "
                "does reranking alone, and retrieval behind one of mteb.models"
            )
