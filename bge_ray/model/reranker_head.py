"""The reranker of a run, settled before anything starts: its spec, and that it has a trained head."""

import json
from pathlib import Path

from bge_ray.errors import ModelError
from bge_ray.model.reranker_spec import RerankerSpec, resolve_reranker
from bge_ray.model.source import fetch_model, read_config
from bge_ray.settings.sections import RerankSettings

# What the weights of a classification head are called, from BERT to the decoders.
HEAD_NAMES = ("classifier.", "score.", "head.", "logits_proj.", "summary.")


def settle_reranker(settings: RerankSettings) -> RerankerSpec:
    """Resolve the reranker, with the compute dtype of a CPU where it is automatic.

    Raises:
        ModelError: the model is not to be had, or has no classification head with one output. Its
            missing weights would be drawn at random, and every score with them.
    """
    spec = resolve_reranker(
        settings.model,
        revision=settings.revision,
        max_length=settings.max_length,
        dtype=settings.dtype,
        on_gpu=False,
    )
    folder, _ = fetch_model(settings.model, settings.revision)
    names = tensor_names(folder)
    if not any(name.startswith(HEAD_NAMES) for name in names):
        raise ModelError(
            f"rerank.model {settings.model}: among its {len(names)} weights there is no classification head; "
            "it is an encoder, not a reranker"
        )
    config = read_config(folder)
    labels = (
        len(config["id2label"]) if isinstance(config.get("id2label"), dict) else config.get("num_labels", 2)
    )
    if labels != 1:
        raise ModelError(f"rerank.model {settings.model}: has {labels} outputs where a reranker has 1")
    return spec


def tensor_names(folder: Path) -> set[str]:
    """Return the names of all weights of a model folder, from the headers of its safetensors files.

    Raises:
        ModelError: a file is none of safetensors.
    """
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                names |= set(json.loads(file.read(min(size, 100 << 20))))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: is no safetensors file: {error}") from error
    return names - {"__metadata__"}
