"""Which reranker: everything about it that decides a score, settled before anything runs."""

from dataclasses import dataclass

from bge_ray.errors import ModelError
from bge_ray.model.source import fetch_model, hash_model, position_limit, read_config
from bge_ray.settings.sections import Auto, ComputeDtype

# FlagReranker's own; the positions of bge-reranker-v2-m3 go further, and its authors use 1024.
DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class RerankerSpec:
    """The reranker as it was resolved: everything about it that decides a score."""

    name: str
    revision: str | None
    weights_sha256: str
    max_length: int
    dtype: str


def resolve_reranker(
    name: str,
    *,
    revision: str | None = None,
    max_length: int | None = None,
    dtype: ComputeDtype | Auto = "auto",
    on_gpu: bool,
) -> RerankerSpec:
    """Settle everything about the reranker that decides a score.

    Args:
        name: hub id or local folder.
        revision: commit, tag or branch on the hub.
        max_length: tokens of a pair, special tokens included; None takes 512, FlagReranker's default.
        dtype: compute dtype; auto is float16 on a GPU and float32 on a CPU.
        on_gpu: whether the rerankers have GPUs.

    Raises:
        ModelError: the model is not to be had, or has too few positions.
    """
    folder, commit = fetch_model(name, revision)
    limit = position_limit(read_config(folder))
    if max_length is not None and limit is not None and max_length > limit:
        raise ModelError(f"rerank.max_length {max_length}: {name} has positions for {limit} tokens")
    wanted = max_length or min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    return RerankerSpec(
        name=name,
        revision=commit,
        weights_sha256=hash_model(str(folder)),
        max_length=wanted,
        dtype=("float16" if on_gpu else "float32") if dtype == "auto" else dtype,
    )
