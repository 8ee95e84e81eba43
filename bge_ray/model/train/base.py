"""Which model a training begins with, and whether it can be trained at all. No torch."""

from dataclasses import dataclass

from bge_ray.errors import ModelError
from bge_ray.model.families import cross_encoder, llm
from bge_ray.model.feed.pairs import query_share
from bge_ray.model.folder import ModelFolder
from bge_ray.model.source import fetch_model, hash_model
from bge_ray.model.spec import model_folder, resolve_encoder, resolve_reranker
from bge_ray.records.model import COLBERT, EMBEDDING, SCORE, SPARSE, ModelSpec, RerankerSpec
from bge_ray.records.outputs import Output
from bge_ray.settings.sections import ModelSettings, RerankSettings, Settings, TrainSettings


@dataclass(frozen=True)
class Base:
    """A model to be trained; ``fresh_head``: it is an encoder, and gets the head of a reranker at random.

    ``trusted``: Python code of its folder is run.
    """

    spec: ModelSpec
    fresh_head: bool
    trusted: bool


def resolve_base(settings: Settings) -> Base:
    """Settle the model that a training begins with.

    Raises:
        ModelError: it is not to be had, or cannot be trained here; says why.
    """
    if settings.train.kind == "reranker":
        return _reranker(settings.rerank)
    return _embedder(settings.model, settings.train)


def _embedder(asked: ModelSettings, train: TrainSettings) -> Base:
    outputs = (EMBEDDING, SPARSE, COLBERT) if train.unified else (EMBEDDING,)
    spec = resolve_encoder(asked.model_copy(update={"outputs": outputs}), on_gpu=False)
    folder = ModelFolder(model_folder(spec))
    if spec.examples:
        raise ModelError(
            "model.examples: are put before queries that are embedded, not before training; leave them out"
        )
    if folder.modules is not None and not folder.modules.pools_prompt:
        raise ModelError(
            f"{spec.name}: pools without the tokens of its instruction, which is not trained here"
        )
    if max(train.dims, default=1) > spec.dim:
        raise ModelError(f"train.dims {max(train.dims)}: embeddings of {spec.name} have {spec.dim} numbers")
    for name, length in (("query", train.query_max_length), ("passage", train.passage_max_length)):
        if length is not None and length > spec.max_length:
            raise ModelError(
                f"train.{name}_max_length {length}: {spec.name} embeds with {spec.max_length} tokens at most "
                "(model.max_length)"
            )
    return Base(spec, False, asked.trust_remote_code)


def _reranker(asked: RerankSettings) -> Base:
    path, revision = fetch_model(asked.model, asked.revision, "rerank.model")
    folder = ModelFolder(path, revision)
    if cross_encoder.recognises(folder):
        spec = resolve_reranker(asked, on_gpu=False)
        if spec.family != cross_encoder.NAME:
            raise ModelError(
                f"rerank.model {asked.model}: is of the family {spec.family}; cross-encoders are trained here"
            )
        return Base(spec, False, asked.trust_remote_code)
    if llm.recognises(folder):
        raise ModelError(
            f"rerank.model {asked.model}: is a decoder, and LLM rerankers are not trained here; take "
            "an encoder, which gets a head, or a cross-encoder"
        )
    return Base(_with_head(folder, asked), True, asked.trust_remote_code)


def _with_head(folder: ModelFolder, asked: RerankSettings) -> RerankerSpec:
    """Return the cross-encoder that an encoder becomes."""
    positions = folder.positions or cross_encoder.DEFAULT_MAX_LENGTH
    if asked.max_length is not None and asked.max_length > positions:
        raise ModelError(
            f"rerank.max_length {asked.max_length}: {asked.model} has positions for {positions} tokens"
        )
    max_length = asked.max_length or min(cross_encoder.DEFAULT_MAX_LENGTH, positions)
    return RerankerSpec(
        name=asked.model,
        revision=folder.revision,
        weights_sha256=hash_model(folder.path),
        family=cross_encoder.NAME,
        outputs=(Output(SCORE, "scalar", 1, "float32"),),
        pooling="cls",
        max_length=max_length,
        normalize=False,
        dtype="float32",
        query_instruction=asked.query_instruction or "",
        passage_instruction=asked.passage_instruction or "",
        query_max_length=asked.query_max_length or query_share(max_length),
    )
