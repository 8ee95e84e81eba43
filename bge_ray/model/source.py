"""Where a model comes from and what it is: hub id or folder to files, files to `ModelSpec`.

Weights are read from safetensors only, so no pickle is opened; Python code in a model folder is run
only with ``model.trust_remote_code``.
"""

import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from bge_ray.errors import ModelError
from bge_ray.model.cards import ModelCard, find_card
from bge_ray.records.dataset import ModelSpec
from bge_ray.settings.sections import ModelSettings, Pooling

logger = logging.getLogger(__name__)

# What from_pretrained may open; anything else in the repository (ONNX twins, pictures) is left there.
FILE_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.py", "1_Pooling/config.json")
POOLING_FILE = "1_Pooling/config.json"
KNOWN_MODULES = {"Transformer", "Pooling", "Normalize"}
# These count positions from padding_idx + 1, so two of their position embeddings are never used.
OFFSET_POSITION_TYPES = {
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "data2vec-text",
    "mpnet",
}
HASH_CHUNK_BYTES = 8 << 20


def fetch_model(name: str, revision: str | None) -> tuple[Path, str | None]:
    """Return the folder of a model and its commit, downloading it from the hub if it is not a folder.

    Raises:
        ModelError: it is neither a folder nor to be had from the hub; says what else would do.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.name {name}: the folder has no config.json")
        return folder.resolve(), None
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(
            f"model.name {name}: no such folder on this machine (each node needs it at the same path)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=list(FILE_PATTERNS)))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelError(f"model.name {name}: the hub has no such model or revision: {error}") from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.name {name}: not a local folder, and the model hub cannot be reached "
            f"({type(error).__name__}: {next(iter(str(error).splitlines()), '')}). Ways out: give a local "
            "folder with its files; point HF_HOME at a cache that holds it (and set HF_HUB_OFFLINE=1); "
            "or set HF_ENDPOINT to a mirror"
        ) from error
    return snapshot, snapshot.name


def resolve_model(settings: ModelSettings, *, on_gpu: bool) -> ModelSpec:
    """Settle everything about the model that decides a vector.

    Args:
        settings: what was asked for.
        on_gpu: whether the encoders have GPUs, which decides the automatic compute dtype.

    Raises:
        ModelError: the model is not to be had, or not usable as asked.
    """
    folder, commit = fetch_model(settings.name, settings.revision)
    card = find_card(settings.name)
    config = read_config(folder)
    _check_modules(folder)
    prompts = _prompts(folder)
    query = settings.query_instruction
    if query is None:
        # sentence-transformers writes an empty prompt by default, which says nothing about the model.
        query = prompts.get("query") or (card.query_instruction if card else "")
    passage = settings.passage_instruction
    if passage is None:
        passage = prompts.get("document") or prompts.get("passage") or ""
    return ModelSpec(
        name=settings.name,
        revision=commit,
        weights_sha256=hash_model(str(folder)),
        dim=_dim(config, card, folder),
        pooling=_pooling(settings, folder, card),
        max_length=_max_length(settings, folder, config, card),
        normalize=settings.normalize,
        dtype=("float16" if on_gpu else "float32") if settings.dtype == "auto" else settings.dtype,
        query_instruction=query,
        passage_instruction=passage,
    )


def hash_model(folder: str) -> str:
    """Return the hex sha256 over the files of a model folder that decide its vectors.

    Raises:
        ModelError: there are no safetensors weights, or a file cannot be read.
    """
    root = Path(folder)
    files = sorted({path for pattern in FILE_PATTERNS for path in root.glob(pattern) if path.is_file()})
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(
            f"{folder}: no .safetensors file; convert the weights first (pickled weights are not opened)"
        )
    try:
        facts = [(path, path.stat()) for path in files]
        return _hash_files(folder, tuple((str(path), s.st_size, s.st_mtime_ns) for path, s in facts))
    except OSError as error:
        raise ModelError(f"{folder}: {error}") from error


@functools.lru_cache(maxsize=4)
def _hash_files(folder: str, facts: tuple[tuple[str, int, int], ...]) -> str:
    # Size and time are part of the key, so that a folder changed under a living process is read again.
    digest = hashlib.sha256()
    for name, size, _ in facts:
        digest.update(f"{Path(name).relative_to(folder).as_posix()}\0{size}\0".encode())
        with Path(name).open("rb") as file:
            while chunk := file.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model folder.

    Raises:
        ModelError: it cannot be read.
    """
    return _read_json(folder / "config.json")


def _dim(config: dict[str, Any], card: ModelCard | None, folder: Path) -> int:
    dim = config.get("hidden_size", config.get("dim"))  # DistilBERT calls it dim
    if not isinstance(dim, int) or dim < 1:
        raise ModelError(f"{folder}/config.json: no hidden_size")
    if card is not None and card.dim != dim:
        logger.warning("%s: its vectors have %d dimensions, %s has %d", folder, dim, card.id, card.dim)
    return dim


def _pooling(settings: ModelSettings, folder: Path, card: ModelCard | None) -> Pooling:
    if settings.pooling != "auto":
        return settings.pooling
    config = _optional_json(folder / POOLING_FILE)
    modes = [
        key.removeprefix("pooling_mode_")
        for key, on in config.items()
        if key.startswith("pooling_mode_") and on is True
    ]
    if isinstance(config.get("pooling_mode"), str):
        modes = [config["pooling_mode"]]
    names: dict[str, Pooling] = {
        "cls": "cls",
        "cls_token": "cls",
        "mean": "mean",
        "mean_tokens": "mean",
        "lasttoken": "last_token",
        "last_token": "last_token",
    }
    if len(modes) == 1 and modes[0] in names:
        return names[modes[0]]
    if modes:
        raise ModelError(
            f"{folder}: pooling {modes} is not supported; "
            "set model.pooling to cls, mean or last_token if it fits"
        )
    if card is not None:
        return card.pooling
    raise ModelError(
        f"{folder}: neither 1_Pooling/config.json nor a model card says how to pool; set model.pooling"
    )


def position_limit(config: dict[str, Any]) -> int | None:
    """Return how many tokens a model has positions for; None if its config.json does not say."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < 1:
        return None
    return positions - (2 if config.get("model_type") in OFFSET_POSITION_TYPES else 0)


def _max_length(settings: ModelSettings, folder: Path, config: dict[str, Any], card: ModelCard | None) -> int:
    limit = position_limit(config) or (card.max_length if card else 512)
    if settings.max_length is not None:
        if settings.max_length > limit:
            raise ModelError(
                f"model.max_length {settings.max_length}: {settings.name} has positions for {limit} tokens"
            )
        return settings.max_length
    trained = _optional_json(folder / "sentence_bert_config.json").get("max_seq_length")
    wanted = int(trained) if trained else (card.max_length if card else limit)
    return min(wanted, limit)


def _prompts(folder: Path) -> dict[str, str]:
    prompts = _optional_json(folder / "config_sentence_transformers.json").get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise ModelError(f"{folder}/config_sentence_transformers.json: prompts is not a map of texts")
    return prompts


def _check_modules(folder: Path) -> None:
    """Refuse a folder whose sentence-transformers modules do more than pool and normalise."""
    path = folder / "modules.json"
    if not path.is_file():
        return
    try:
        modules = [(str(m["type"]), str(m["path"])) for m in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path}: not a list of modules: {error!r}") from error
    unknown = [kind for kind, _ in modules if kind.rpartition(".")[2] not in KNOWN_MODULES]
    # The place of each module is part of the claim: what is not looked at must not decide a vector.
    unknown += [
        f"{kind} in {place}"
        for kind, place in modules
        if (kind.endswith(".Pooling") and f"{place}/config.json" != POOLING_FILE)
        or (kind.endswith(".Transformer") and place)
    ]
    if unknown:
        raise ModelError(
            f"{folder}: modules {unknown} are not supported; its vectors would not be its authors'"
        )
    if _optional_json(folder / "sentence_bert_config.json").get("do_lower_case"):
        raise ModelError(
            f"{folder}: sentence_bert_config.json asks for do_lower_case, which is not supported"
        )
    if _optional_json(folder / POOLING_FILE).get("include_prompt") is False:
        raise ModelError(f"{folder}: pools without its prompt (include_prompt), which is not supported")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return value


def _optional_json(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}
