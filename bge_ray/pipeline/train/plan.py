"""What a training learns from, and its identity: what makes it this one and no other."""

import dataclasses
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from typing import Any

from bge_ray.errors import CorpusError, DatasetMismatchError, InstallationError
from bge_ray.formats.rows import folded
from bge_ray.formats.training import Example, read_examples
from bge_ray.model.train.base import Base
from bge_ray.model.train.examples import Schedule
from bge_ray.records.canonical import digest, flatten
from bge_ray.records.reports import RejectedRow
from bge_ray.settings.sections import Settings, TrainSettings
from bge_ray.storage.objects import Storage

FORMAT_VERSION = 1
SHOWN = 3
PACKAGES = ("accelerate", "datasets", "sentence_transformers")
# They decide nothing of the model: places, what data holds is hashed, and how a run is carried out.
_INDIFFERENT = {"data", "held_out", "output", "checkpoint_steps", "max_failures", "gpus_per_worker"}


@dataclass(frozen=True)
class TrainingData:
    """What is trained on, and by what it is measured; ``left_out`` has the text of a held-out query."""

    examples: list[Example]
    held_out: list[Example]
    left_out: tuple[RejectedRow, ...]
    n_left_out: int
    sha256: str


@dataclass(frozen=True)
class Identity:
    """What decides a trained model, in three parts; training.json in the output holds it."""

    model: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    format_version: int = FORMAT_VERSION

    @property
    def key(self) -> str:
        """A name for all of it."""
        return digest("train", dataclasses.asdict(self))


def check_packages(asked: TrainSettings) -> None:
    """Refuse to begin without a package that training needs.

    Raises:
        InstallationError: names them, and how they are installed.
    """
    needed = (*PACKAGES, "peft") if asked.lora_rank is not None else PACKAGES
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise InstallationError(
            f"training needs {', '.join(missing)}, not installed here: pip install 'bge-ray[train]'"
        )


def read_data(storage: Storage, asked: TrainSettings) -> TrainingData:
    """Read and check everything that is trained on and measured by.

    Raises:
        CorpusError: a line cannot be used; names the first of them by file and line, and how many there are.
    """
    held_out = _read(storage, asked.held_out, "train.held_out", asked) if asked.held_out else []
    found = _read(storage, str(asked.data), "train.data", asked)
    queries = {folded(example.query) for example in held_out}
    examples = [example for example in found if folded(example.query) not in queries]
    left_out = [example for example in found if folded(example.query) in queries]
    if len(examples) < asked.batch_queries:
        raise CorpusError(
            f"train.data {asked.data}: {len(examples):,} queries ({len(left_out):,} more are held out), "
            f"and a step has {asked.batch_queries}; lower train.batch_queries"
        )
    shown = [
        RejectedRow("held_out", f"{example.place}: {example.query[:200]}", example.query_id)
        for example in left_out[:SHOWN]
    ]
    return TrainingData(examples, held_out, tuple(shown), len(left_out), _digest(examples))


def _read(storage: Storage, uri: str, key: str, asked: TrainSettings) -> list[Example]:
    faults: list[str] = []

    def reject(query_id: str | None, _: str | None, reason: str, detail: str) -> None:
        faults.append(f"{detail} ({reason}{'' if query_id is None else f' {query_id}'})")

    examples = []
    for example in read_examples(storage, uri, reject):
        fault = _unfit(example, asked, measures=key == "train.held_out")
        if fault is None:
            examples.append(example)
        else:
            faults.append(f"{example.place}: {fault}")
    if faults:
        more = f"; and {len(faults) - SHOWN:,} more" if len(faults) > SHOWN else ""
        raise CorpusError(f"{key}: {len(faults):,} lines cannot be used: {'; '.join(faults[:SHOWN])}{more}")
    if not examples:
        raise CorpusError(f"{key} {uri}: has no line")
    return examples


def _unfit(example: Example, asked: TrainSettings, *, measures: bool) -> str | None:
    """Return what an example lacks, or None."""
    needs_negatives = asked.kind == "reranker" if measures else asked.group > 1
    if needs_negatives and not example.negatives:
        why = "the reranker is measured by" if measures else f"train.group {asked.group} takes"
        return f"neg is missing or empty, and {why} negatives"
    if not measures and asked.distill != "none":
        for name, scores in (("pos", example.positive_scores), ("neg", example.negative_scores)):
            if scores is None:
                return f"{name}_scores is missing, which train.distill {asked.distill} learns from"
    return None


def _digest(examples: list[Example]) -> str:
    sha = hashlib.sha256()
    for example in examples:
        facts = [
            example.query,
            example.labels.get("prompt"),
            example.texts,
            example.negatives,
            example.positive_scores,
            example.negative_scores,
        ]
        sha.update(json.dumps(facts, ensure_ascii=False).encode() + b"\n")
    return sha.hexdigest()


def identify(settings: Settings, base: Base, data: TrainingData) -> Identity:
    """Return what makes a training this one."""
    spec = dataclasses.asdict(base.spec)
    model = {
        name: spec[name] for name in spec if name not in ("name", "revision", "outputs", "dtype", "kernels")
    }
    held_out = _digest(data.held_out) if data.held_out else None
    return Identity(
        model=json.loads(json.dumps(model)) | {"fresh_head": base.fresh_head},
        data={"train.data": data.sha256, "train.held_out": held_out},
        settings=settings.train.model_dump(mode="json", exclude=_INDIFFERENT),
    )


def refuse_other(found: Identity, wanted: Identity, output: str) -> None:
    """Refuse an output that has another training, or the beginning of one.

    Raises:
        DatasetMismatchError: names what differs.
    """
    differ = []
    for part in ("model", "data", "settings"):
        there, here = flatten(getattr(found, part)), flatten(getattr(wanted, part))
        prefix = {"model": "model: ", "data": "data: ", "settings": "train."}[part]
        differ += [
            f"{prefix}{name} was {_short(there.get(name))}, now {_short(here.get(name))}"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
    if found.format_version != wanted.format_version:
        differ.append(f"its format is {found.format_version}, this version's {wanted.format_version}")
    if differ:
        raise DatasetMismatchError(
            f"train.output {output}: holds another training ({'; '.join(differ)}); give it another "
            "train.output, or the same model, data and settings to go on with it"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 24 else f"{text[:20]}..."


def make_schedule(asked: TrainSettings, examples: int) -> Schedule:
    """Return the steps of a training."""
    steps = asked.steps or asked.epochs * (examples // asked.batch_queries)
    return Schedule(examples, asked.batch_queries, steps, asked.seed)
