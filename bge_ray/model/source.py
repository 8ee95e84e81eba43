"""Where a model comes from: a folder, the hub or any fsspec URI, to files on this node and their hash.

Python code in a model folder is run only with ``trust_remote_code``.
"""

import fnmatch
import hashlib
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any, Literal, TypeAlias

from bge_ray.errors import ModelError, StorageError
from bge_ray.model.cache import cache_folder, locked
from bge_ray.model.modules import MODULES_FILE, TRANSFORMER_FILES, list_modules, module_files
from bge_ray.model.weights import HEAD_FILES, is_head, tensor_shapes, weight_files
from bge_ray.records.plan import NO_VERSION
from bge_ray.storage.objects import ObjectInfo, Storage

logger = logging.getLogger(__name__)

# The setting that names a model, for messages.
Setting: TypeAlias = Literal["model.name", "rerank.model", "merge.models", "model"]

# What from_pretrained may open; anything else in the repository (ONNX twins, pictures) is left there.
HEAD_PATTERNS = tuple(name for names in HEAD_FILES.values() for name in names)
FILE_PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.py",
    # The modules of sentence-transformers, whose folders are numbered.
    "[0-9]*_*/config.json",
    "[0-9]*_*/model.safetensors",
    "[0-9]*_*/pytorch_model.bin",
    *HEAD_PATTERNS,
)
# Taken where there are no safetensors. The other pickles of a repository are the state of its training.
PICKLED_PATTERNS = ("pytorch_model.bin", "pytorch_model-*.bin")
# What decides an output beside the weights: architecture, tokenizer, and the files in which
# sentence-transformers says how states become vectors. The state of a training or a list of licences is no
# part of a model.
DECISIVE_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
    MODULES_FILE,
    *TRANSFORMER_FILES,
    "config_sentence_transformers.json",
)
# These decide what becomes of tokens, and not which there are.
NO_TOKENIZER_FILES = ("config.json", MODULES_FILE, "config_sentence_transformers.json")
CODE_FILES = ("*.py",)
# Beside it lie the weights of an adapter, as peft writes them.
ADAPTER_FILE = "adapter_config.json"
CHUNK_BYTES = 8 << 20
FETCH_BYTES = 64 << 20
# A file can change within one tick of its file system's clock without another time: such a hash is not kept.
FRESH_S = 2.0
STORAGE = Storage()


def fetch_model(name: str, revision: str | None, setting: Setting = "model.name") -> tuple[Path, str | None]:
    """Return the folder of a model on this node and its commit.

    Args:
        name: a folder, the URI of one on any fsspec store, or a hub id; the last two are fetched once a node.
        revision: commit, tag or branch on the hub.
        setting: what named the model.

    Raises:
        ModelError: it is none of the three or not to be had; says what else would do.
    """
    folder, commit = _fetch(name, revision, setting)
    _check_folder(folder, name, setting)
    return folder, commit


def _fetch(name: str, revision: str | None, setting: Setting) -> tuple[Path, str | None]:
    if "://" in name:
        return _fetch_uri(name, setting), None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve(), None
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(
            f"{setting} {name}: no such folder on this machine (each node needs it at the same path; one in "
            "object storage, as s3://bucket/model, is fetched by each node)"
        )
    return _fetch_hub(name, revision, setting)


def _check_folder(folder: Path, name: str, setting: Setting) -> None:
    """Refuse a folder that holds no whole transformer.

    Raises:
        ModelError: says what it holds instead, and the way out.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise ModelError(
            f"{setting} {name}: {ADAPTER_FILE} says that it is an adapter of another model; merge the two "
            "(peft: merge_and_unload), save that, and leave the adapter's files out"
        )
    if (folder / "config.json").is_file():
        return
    listed = list_modules(folder) or []
    inside = [place for _, place in listed if place and (folder / place / "config.json").is_file()]
    if listed and listed[0][0].endswith(".Transformer") and listed[0][1] in inside:
        raise ModelError(
            f"{setting} {name}: its transformer lies in {listed[0][1]}, as sentence-transformers before "
            "2.0 laid it; load it with a later version and save it again"
        )
    kinds = ", ".join(kind.rpartition(".")[2] for kind, _ in listed)
    found = f", only sentence-transformers' {kinds}; what is run is a transformer" if kinds else ""
    raise ModelError(f"{setting} {name}: the folder has no config.json{found}")


def _fetch_hub(name: str, revision: str | None, setting: Setting) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=list(FILE_PATTERNS)))
        if not any(not is_head(path.name) for path in snapshot.glob("*.safetensors")):
            patterns = [*FILE_PATTERNS, *PICKLED_PATTERNS]
            # By its commit: a branch may have moved since.
            snapshot = Path(snapshot_download(name, revision=snapshot.name, allow_patterns=patterns))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelError(f"{setting} {name}: the hub has no such model or revision: {error}") from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{setting} {name}: not a local folder, and the model hub cannot be reached "
            f"({type(error).__name__}: {next(iter(str(error).splitlines()), '')}). Ways out: give a local "
            "folder with its files, or its URI in object storage; point HF_HOME at a cache that holds it "
            "(and set HF_HUB_OFFLINE=1); or set HF_ENDPOINT to a mirror"
        ) from error
    return snapshot, snapshot.name


def _fetch_uri(uri: str, setting: Setting) -> Path:
    """Return this node's copy of a model folder in storage, fetched unless this version of it is there."""
    try:
        files = _model_files(uri)
        if "config.json" not in files:
            raise ModelError(f"{setting} {uri}: there is no folder of this name with a config.json")
        key = _version(uri, files)
        folder = cache_folder() / "models" / key
        if folder.is_dir():
            return folder
        with locked(key) as cache:
            # Each process that came first and died left its half here: under the lock, nobody writes it.
            partial = cache / "models" / f"{key}.partial"
            if not folder.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
                size = sum(info.size for info in files.values())
                logger.info("fetching %s, %s bytes in %d files, to %s", uri, f"{size:,}", len(files), folder)
                for name, info in files.items():
                    _fetch_file(info, partial / name)
                if _version(uri, _model_files(uri)) != key:
                    raise ModelError(f"{setting} {uri}: its files changed while they were fetched; run again")
                partial.rename(folder)
    except StorageError as error:
        raise ModelError(f"{setting} {uri}: {error}") from error
    except OSError as error:
        raise ModelError(
            f"{setting} {uri}: cannot be kept in {cache_folder()}: {error}; "
            "set BGE_RAY_CACHE to a folder with room"
        ) from error
    return folder


def _model_files(uri: str) -> dict[str, ObjectInfo]:
    """Return the objects below a URI that a model is made of, by their path in the folder."""
    root = uri.rstrip("/")
    listed = STORAGE.list_files(root)
    # A client may spell the URI in its own way; what follows the folder's name is the same.
    tail = root.partition("://")[2].strip("/")
    files = {info.uri.partition("://")[2].strip("/").removeprefix(tail).strip("/"): info for info in listed}
    patterns: tuple[str, ...] = FILE_PATTERNS
    if not any(_matches(name, "*.safetensors") and not is_head(name) for name in files):
        patterns += PICKLED_PATTERNS
    return {n: i for n, i in files.items() if any(_matches(n, pattern) for pattern in patterns)}


def _matches(name: str, pattern: str) -> bool:
    """Tell whether a path is one that ``Path.glob`` of a pattern would find: a star crosses no folder."""
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def _version(uri: str, files: dict[str, ObjectInfo]) -> str:
    facts = [uri, *([name, info.size, _etag(info)] for name, info in sorted(files.items()))]
    label = "".join(c if c.isalnum() or c in "._-" else "-" for c in uri.rstrip("/").rpartition("/")[2])
    return f"{label[:60]}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}"


def _etag(info: ObjectInfo) -> str:
    if info.etag != NO_VERSION:
        return info.etag

    def unique(fs: Any, path: str) -> str:
        return str(fs.ukey(path))

    # The store has no etag and no time; its client knows what else changes with the content.
    return STORAGE.attempt("look at", info.uri, unique)


def _fetch_file(info: ObjectInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with STORAGE.open(info.uri, info.size) as source, path.open("wb") as target:
        while chunk := source.read(FETCH_BYTES):
            target.write(chunk)


def hash_model(folder: Path) -> str:
    """Return the hex sha256 over the files of a model folder that decide its outputs.

    It is computed once a node: a later call, in this process or another, finds it in the node's cache as long
    as no file has another size or time.

    Args:
        folder: a folder that `fetch_model` returned. Its Python code is part of the model where its
            configuration names it, whether it may be run or not: the hash is the same either way.

    Raises:
        ModelError: there are no weights, or a file cannot be read.
    """
    weights = weight_files(folder)
    try:
        patterns = DECISIVE_FILES + (CODE_FILES if _names_code(folder) else ())
    except OSError as error:
        raise ModelError(f"{folder}: {error}") from error
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    found.update(module_files(folder), weights.files, [weights.index] if weights.index is not None else [])
    files = sorted(found)
    try:
        facts = _facts(files)
        key = hashlib.sha256(json.dumps([str(folder), facts]).encode()).hexdigest()
        with locked(f"hash-{key[:32]}") as cache:
            kept = cache / "hashes" / key
            if kept.is_file():
                return kept.read_text()
            # A file that is cut off has another hash, too, which would look like another model.
            tensor_shapes([path for path in files if path.suffix == ".safetensors"])
            digest = _hash_files(folder, files)
            newest = max(modified for _, _, modified, _ in facts) / 1e9
            if newest < time.time() - FRESH_S and _facts(files) == facts:
                kept.parent.mkdir(exist_ok=True)
                partial = kept.with_suffix(".partial")
                partial.write_text(digest)
                partial.rename(kept)
            return digest
    except OSError as error:
        raise ModelError(f"{folder}: {error}") from error


def hash_tokenizer(folder: Path) -> str:
    """Return the hex sha256 over the files of a model folder that decide how it reads texts.

    Raises:
        ModelError: a file cannot be read.
    """
    names = [name for name in DECISIVE_FILES if name not in NO_TOKENIZER_FILES]
    try:
        return _hash_files(folder, sorted({p for name in names for p in folder.glob(name) if p.is_file()}))
    except OSError as error:
        raise ModelError(f"{folder}: {error}") from error


def _names_code(folder: Path) -> bool:
    files = [folder / name for name in ("config.json", "tokenizer_config.json")]
    return any(b'"auto_map"' in path.read_bytes() for path in files if path.is_file())


def _facts(files: list[Path]) -> list[tuple[str, int, int, int]]:
    stats = [(path, path.stat()) for path in files]
    return [(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]


def _hash_files(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def is_hub_id(name: str) -> bool:
    """Tell whether a name has the form of a hub id, and neither that of a path nor of a URI."""
    return "://" not in name and not name.startswith(("/", ".", "~")) and name.count("/") == 1


def base_name(name: str) -> str:
    """Return a hub id as it is, and of a folder or a URI its last name: a path means nothing elsewhere."""
    return name if is_hub_id(name) else name.rstrip("/").rpartition("/")[2]
