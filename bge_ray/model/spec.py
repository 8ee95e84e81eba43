"""Settings to a `ModelSpec`, and from there to the family, the folder and the feeder of a model. No torch."""

import dataclasses
from pathlib import Path
from typing import Any

from bge_ray.errors import DatasetMismatchError, ModelError
from bge_ray.model.families import FAMILIES, bm25, llm
from bge_ray.model.family import Family, shown, task_prompts
from bge_ray.model.feed.pairs import PairFeeder
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.folder import ModelFolder
from bge_ray.model.source import Setting, fetch_model, hash_model, hash_tokenizer
from bge_ray.model.weights import HEAD_FILES, weights_bytes
from bge_ray.records.model import BM25, EMBEDDING, ModelSpec
from bge_ray.settings.sections import ModelSettings, RerankSettings

# Weights of more bytes in float32 are tried in bfloat16.
FLOAT32_TRIAL_BYTES = 8_000_000_000


def resolve_encoder(settings: ModelSettings, *, on_gpu: bool) -> ModelSpec:
    """Settle everything about the encoder that decides a vector.

    Vectors are stored as float32 where they are computed so, and else as float16; `ModelSpec.stored_as` says
    otherwise.

    Args:
        settings: what was asked for.
        on_gpu: whether the encoders have GPUs, which decides the automatic compute dtype.

    Raises:
        ModelError: the model is not to be had, or not usable as asked.
    """
    path, revision = fetch_model(settings.name, settings.revision)
    folder = ModelFolder(path, revision)
    encoders = (family for family in FAMILIES if family.ROLE == "encoder" and family.recognises(folder))
    of_states = tuple(name for name in settings.outputs if name != BM25)
    if settings.truncate_dim is not None and EMBEDDING not in of_states:
        raise ModelError(
            f"model.truncate_dim {settings.truncate_dim}: is of {EMBEDDING}, which model.outputs does not "
            "ask for; leave it out"
        )
    family = next(encoders) if of_states else bm25
    _check_llm_settings(family.NAME, settings, settings.name)
    spec = family.resolve(folder, settings.model_copy(update={"outputs": of_states}), on_gpu=on_gpu)
    if of_states and BM25 in settings.outputs:
        counts = bm25.counts_output(folder, trust_remote_code=settings.trust_remote_code)
        spec = dataclasses.replace(spec, outputs=(*spec.outputs, counts))
    missing = set(settings.outputs) - {output.name for output in spec.outputs}
    if missing:
        needed = "; ".join(
            f"{name}: {' or '.join(HEAD_FILES[name])}" for name in sorted(missing & HEAD_FILES.keys())
        )
        raise ModelError(
            f"model.outputs: {settings.name} has no {' and no '.join(sorted(missing))}; bge-m3 and what is "
            f"tuned from it have them, by a head in a file of their folder ({needed})"
        )
    return spec


def asked_of_queries(spec: ModelSpec, asked: ModelSettings) -> ModelSpec:
    """Return the model of a data set as the settings, where they say so, let it read queries.

    That is what is put around them, and a shorter cut.

    Raises:
        DatasetMismatchError: the passages were embedded for another task.
        ModelError: the model has no such task.
    """
    _check_llm_settings(spec.family, asked, spec.name)
    changes: dict[str, Any] = {}
    if (of_task := task_prompts(asked.task, spec.name)) is not None:
        if of_task.passage != spec.passage_instruction:
            raise DatasetMismatchError(
                f"model.task {asked.task}: the passages were embedded with {spec.passage_instruction!r} "
                f"before them, and not with {of_task.passage!r}; search with the task they were embedded for"
            )
        changes["query_instruction"] = of_task.query
    if asked.query_instruction is not None:
        changes["query_instruction"] = asked.query_instruction
    if asked.query_template is not None:
        changes["query_template"] = asked.query_template
    if asked.max_length is not None:
        changes["max_length"] = min(asked.max_length, spec.max_length)
    spec = dataclasses.replace(spec, **changes)
    if asked.examples:
        spec = dataclasses.replace(spec, examples=shown(asked, spec.query_instruction))
    return spec


def _check_llm_settings(family: str, asked: ModelSettings, name: str) -> None:
    """Refuse settings that say nothing to a model that is no LLM embedder.

    Raises:
        ModelError: names them.
    """
    given = {
        "model.query_template": asked.query_template is not None,
        "model.examples": bool(asked.examples),
        "model.last_token": asked.last_token is not None,
    }
    if family != llm.NAME and any(given.values()):
        keys = ", ".join(key for key, is_given in given.items() if is_given)
        raise ModelError(f"{keys}: {name} is no LLM embedder and takes none; leave it out")


def resolve_reranker(settings: RerankSettings, *, on_gpu: bool) -> ModelSpec:
    """Settle everything about the reranker that decides a score.

    Raises:
        ModelError: the model is not to be had, is no reranker, lacks a part of its head, or has too few
            positions.
    """
    path, revision = fetch_model(settings.model, settings.revision, "rerank.model")
    folder = ModelFolder(path, revision)
    for family in FAMILIES:
        if family.ROLE == "reranker" and family.recognises(folder):
            return family.resolve(folder, settings, on_gpu=on_gpu)
    raise ModelError(
        f"rerank.model {settings.model}: among its {len(folder.weights)} weights there is no classification "
        "head; it is an encoder, not a reranker"
    )


def family_of(spec: ModelSpec) -> Family:
    """Return the family of a spec.

    Raises:
        ModelError: this version knows none of that name.
    """
    for family in FAMILIES:
        if spec.family == family.NAME:
            return family
    raise ModelError(
        f"{spec.name}: is of the family {spec.family!r}, known are {', '.join(f.NAME for f in FAMILIES)}"
    )


def for_trial(spec: ModelSpec, folder: Path) -> ModelSpec:
    """Return the model as it is run on a CPU beside a run, whatever that computes in; vectors stay float32.

    In float32, which every machine gives alike, but for a model that is too large to be held so.
    """
    large = bytes_of(dataclasses.replace(spec, dtype="float32"), folder) > FLOAT32_TRIAL_BYTES
    return dataclasses.replace(spec, dtype="bfloat16" if large else "float32").stored_as("float32")


def bytes_of(spec: ModelSpec, folder: Path) -> int:
    """Return the bytes that the weights of a model take where it is computed; none where it is not run."""
    return 0 if spec.counts_only else weights_bytes(folder, spec.dtype)


def hash_files(spec: ModelSpec, folder: Path) -> str:
    """Return the hex sha256 over the files of a folder that decide the outputs of its family.

    Raises:
        ModelError: a file cannot be read, or there are no weights where some are needed.
    """
    return hash_tokenizer(folder) if spec.family == bm25.NAME else hash_model(folder)


def model_folder(spec: ModelSpec) -> Path:
    """Return the folder of a resolved model on this node, fetched if need be.

    Raises:
        ModelError: it is not to be had.
    """
    setting: Setting = "rerank.model" if family_of(spec).ROLE == "reranker" else "model.name"
    return fetch_model(spec.name, spec.revision, setting)[0]


def text_feeder(spec: ModelSpec, *, trust_remote_code: bool = False) -> TextFeeder:
    """Load what turns the texts of an encoder into tokens.

    Raises:
        ModelError: the model is not to be had, has no fast tokenizer, or takes no single texts.
    """
    feeder = family_of(spec).feeder(spec, model_folder(spec), trust_remote_code=trust_remote_code)
    if not isinstance(feeder, TextFeeder):
        raise ModelError(f"{spec.name}: is a reranker, which takes pairs and no single texts")
    return feeder


def pair_feeder(spec: ModelSpec, *, trust_remote_code: bool = False) -> PairFeeder:
    """Load what turns the pairs of a reranker into tokens.

    Raises:
        ModelError: the model is not to be had, has no fast tokenizer, or takes no pairs.
    """
    feeder = family_of(spec).feeder(spec, model_folder(spec), trust_remote_code=trust_remote_code)
    if not isinstance(feeder, PairFeeder):
        raise ModelError(f"{spec.name}: is an encoder, which takes single texts and no pairs")
    return feeder
