"""All settings of all jobs: one frozen object, read from YAML and ``--set section.key=value``.

Every job takes the same sections, so one file can describe a whole chain. A key that is unknown,
of the wrong type or impossible is refused before anything starts. Secrets have no place here:
storage and hub credentials come from the environment.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bge_ray.errors import SettingsError
from bge_ray.records.ids import MAX_ROWS_PER_OBJECT
from bge_ray.records.schemas import RESERVED_COLUMNS
from bge_ray.settings.credentials import refuse_credentials
from bge_ray.settings.variables import expand
from bge_ray.settings.yaml_keys import read_yaml

Pooling: TypeAlias = Literal["cls", "mean", "last_token", "max", "mean_sqrt_len", "weighted_mean"]
ComputeDtype: TypeAlias = Literal["float32", "float16", "bfloat16"]
OutputDtype: TypeAlias = Literal["float32", "float16"]
EncoderOutput: TypeAlias = Literal["embedding", "sparse", "colbert", "bm25"]
FirstStage: TypeAlias = Literal["dense", "sparse", "bm25"]
Kernels: TypeAlias = Literal["plain", "fused"]
Auto: TypeAlias = Literal["auto"]
Reuse: TypeAlias = Literal["object", "corpus", "off"]

# Of two letters or more: C:/ is a path.
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")


class Section(BaseModel):
    """Base of every section: immutable, and no key that is not declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _is_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Take one value for a list of it, and no true or false for a number."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError(f"{str(value).lower()} is no value of it")
        if isinstance(value, str | int | float) and tuple in kinds and str not in kinds:
            return (value,)
        return value


def _kinds(annotation: Any) -> set[Any]:
    """Return the classes whose values an annotation takes."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return {get_origin(part) or part for part in parts}


def _check_location(value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    """Refuse what looks like a URI and is none: it would be taken for a path on this machine."""
    for location in (value,) if isinstance(value, str) else value or ():
        if not location.strip():
            raise ValueError("is empty")
        if (found := _ONE_SLASH.match(location)) is not None:
            raise ValueError(f"one slash is missing: {found[1]}://...")
    return value


class CorpusSettings(Section):
    """Where the passages are and which columns hold them."""

    _locations = field_validator("uri")(_check_location)

    uri: str | None = Field(
        None, description="file, folder or glob on any fsspec URI (s3://, gs://, az://, a local path)"
    )
    format: Literal["auto", "parquet", "jsonl", "csv"] = Field(
        "auto",
        description="file format; auto goes by the name (.parquet, .jsonl, .ndjson, .csv, .tsv; .gz, .zst)",
    )
    csv_quoting: Literal["auto", "csv", "none"] = Field(
        "auto",
        description="quotes in CSV and TSV files: csv, so that a quoted field may hold separators and line "
        "breaks; none, plain characters; auto is csv, but a line break in a field of a TSV is refused",
    )
    header: tuple[str, ...] | None = Field(
        None, min_length=1, description="columns of CSV and TSV files whose first line does not name them"
    )
    id_column: str = Field(
        "auto", description="column of the passage id; auto takes _id, id or passage_id, whichever is there"
    )
    text_column: str = Field("text", description="column of the passage text")
    title_column: str | None = Field(
        "auto",
        description="column joined in front of the text; auto takes `title` if any object has it; null: none",
    )
    keep_columns: tuple[str, ...] = Field(
        (), description="metadata columns copied into the embedding shards, in their own types"
    )
    max_rejected_fraction: float = Field(
        0.01, ge=0, le=1, description="share of rows that may be rejected before the run counts as failed"
    )

    @model_validator(mode="after")
    def _kept_names_are_free(self) -> "CorpusSettings":
        clash = sorted(set(self.keep_columns) & set(RESERVED_COLUMNS))
        if clash:
            raise ValueError(f"keep_columns: {clash} are names of our own columns; rename them in the corpus")
        if len(set(self.keep_columns)) != len(self.keep_columns):
            raise ValueError("keep_columns: a column is named twice")
        return self


class ExampleSettings(Section):
    """A query and its answer, by which a model is shown what is looked for."""

    instruction: str | None = Field(None, description="null takes that of the queries")
    query: str
    response: str


class ModelSettings(Section):
    """Which model makes the vectors, and how."""

    _locations = field_validator("name")(_check_location)

    name: str = Field(
        "BAAI/bge-small-en-v1.5", description="hub id, local folder, or URI of a folder (s3://, gs://, az://)"
    )
    revision: str | None = Field(
        None, description="hub commit, tag or branch; resolved to a commit and pinned in dataset.json"
    )
    outputs: tuple[EncoderOutput, ...] = Field(
        ("embedding",),
        min_length=1,
        description="what to make of a passage: embedding (one vector), sparse (token weights), colbert (one "
        "vector a token), these two with bge-m3 and models tuned from it; bm25 (how often it has each token, "
        "by the tokenizer of any model; alone it takes no model)",
    )
    pooling: Pooling | Auto = Field(
        "auto", description="tokens to one vector; auto takes what the model card or folder says"
    )
    max_length: int | None = Field(
        None,
        ge=3,
        description="tokens kept of a text, special tokens included; null takes the model's own limit",
    )
    dtype: ComputeDtype | Auto = Field(
        "auto", description="compute dtype; auto is float16 on a GPU and float32 on a CPU"
    )
    kernels: Kernels | Auto = Field(
        "auto",
        description="plain: the layers of transformers; fused: of a BERT, RoBERTa or XLM-RoBERTa, with fewer "
        "kernels and a GELU by tanh; auto is fused in half precision on a GPU where the model allows it",
    )
    normalize: bool | Auto = Field(
        "auto",
        description="scale each vector to unit L2 norm, which an index needs; auto does, unless the modules "
        "of sentence-transformers in the model folder do not",
    )
    truncate_dim: int | None = Field(
        None,
        ge=1,
        description="numbers kept of each vector, its first, for models trained so (Matryoshka); null: as "
        "many as the model folder says, else all",
    )
    query_instruction: str | None = Field(
        None,
        description="text put before a query, or the task in the template of a model that has one; null "
        "takes the model card's, an empty string means none",
    )
    query_template: str | None = Field(
        None,
        description="a query as an LLM embedder reads it, of {instruction} and {query}; null takes the "
        "model card's",
    )
    task: str | None = Field(
        None,
        description="kind of task of a model with an instruction for each, on both sides (llm-embedder: qa, "
        "icl, chat, lrlm, tool, convsearch)",
    )
    examples: tuple[ExampleSettings, ...] = Field(
        (),
        description="list of {instruction, query, response} put before every query; for models trained with "
        "examples, such as bge-en-icl",
    )
    passage_instruction: str | None = Field(
        None, description="text put before a passage; null takes the model folder's (BGE has none)"
    )
    last_token: str | None = Field(
        None,
        description="token that every text ends with, for last-token pooling; null: as the card or the "
        "tokenizer's files say, an empty string: none, so that a word is pooled",
    )
    trust_remote_code: bool = Field(
        False, description="run Python code found in the model folder; off unless you trust its author"
    )

    @model_validator(mode="after")
    def _outputs_are_different(self) -> "ModelSettings":
        if len(set(self.outputs)) != len(self.outputs):
            raise ValueError("outputs: one is named twice")
        return self

    @field_validator("query_template")
    @classmethod
    def _has_places(cls, template: str | None) -> str | None:
        if template is None:
            return None
        before, found, behind = template.partition("{query}")
        if (
            not found
            or "{query}" in behind
            or before.count("{instruction}") != 1
            or "{instruction}" in behind
        ):
            raise ValueError("takes {instruction} once, and {query} once behind it")
        return template


class BatchingSettings(Section):
    """How rows are cut into work units and forward passes."""

    token_budget: int | Auto = Field(
        "auto",
        description="tokens of one forward pass, padding included; auto is 1024 on a CPU, and on a GPU what "
        "suits it and the model, such as 32768 for base on an H100",
    )
    unit_rows: int | Auto = Field(
        "auto",
        description="most rows of one work unit, the piece that is committed, retried and resumed; auto "
        "gives every encoder several units, of at most 50000 rows",
    )
    unit_bytes: int = Field(
        96_000_000, ge=1_000_000, description="most bytes of text plus all outputs of one work unit, in bytes"
    )

    @model_validator(mode="after")
    def _budget_is_positive(self) -> "BatchingSettings":
        if isinstance(self.token_budget, int) and self.token_budget < 1:
            raise ValueError("token_budget: must be at least 1 token")
        return self

    @model_validator(mode="after")
    def _units_have_rows(self) -> "BatchingSettings":
        if isinstance(self.unit_rows, int) and not 1 <= self.unit_rows < MAX_ROWS_PER_OBJECT:
            raise ValueError(f"unit_rows: must be at least 1 and less than {MAX_ROWS_PER_OBJECT}")
        return self


class ChunkingSettings(Section):
    """Whether and how long texts are cut, so that the model sees all of each."""

    max_tokens: int | None = Field(
        None,
        ge=1,
        description="most tokens of a chunk as the model sees it: special tokens, instruction and title "
        "included; null: a text is one row, and cut off at model.max_length",
    )
    overlap_tokens: int = Field(
        0,
        ge=0,
        description="most tokens that a chunk repeats of the one before, in whole sentences, and of a "
        "sentence longer than a chunk in whole pieces",
    )
    boundary: Literal["sentence", "paragraph", "token"] = Field(
        "sentence",
        description="where a chunk ends if it can: sentence, paragraph (then sentence), or token; what is "
        "longer than a chunk is cut at lines, words, tokens",
    )
    language: str = Field(
        "en",
        min_length=2,
        description="language whose abbreviations end no sentence (ISO 639-1); others are cut, too",
    )
    titles: Literal["first", "every"] = Field(
        "first", description="which chunks have the title in front: the first of a text, or every one"
    )
    keep_text: bool = Field(False, description="store the text of each chunk in the column chunk_text")
    late: bool = Field(
        False,
        description="make the vector of a chunk of its tokens' states as they are among up to "
        "model.max_length tokens of its text, for models that pool by mean",
    )

    @model_validator(mode="after")
    def _overlaps_less_than_half(self) -> "ChunkingSettings":
        if self.max_tokens is None and self.overlap_tokens:
            raise ValueError("overlap_tokens: there are no chunks without max_tokens")
        if self.max_tokens is None and self.late:
            raise ValueError("late: there are no chunks without max_tokens")
        if self.max_tokens is not None and self.overlap_tokens > self.max_tokens // 2:
            raise ValueError(f"overlap_tokens: must be at most half of max_tokens ({self.max_tokens})")
        return self


class OutputSettings(Section):
    """Where the data set is written."""

    _locations = field_validator("uri")(_check_location)

    uri: str | None = Field(None, description="folder of the data set on any fsspec URI")
    dtype: OutputDtype | Auto = Field(
        "auto",
        description="dtype of what is stored; auto is float16, but float32 for embedding when model.dtype is "
        "float32",
    )
    compression: Literal["zstd", "snappy", "none"] = Field(
        "zstd", description="Parquet compression of the embedding shards"
    )
    storage_timeout_s: float = Field(
        120.0, gt=0, description="how long a failing storage operation is retried, in seconds"
    )
    max_removed_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the data set's rows that may go with objects that left the corpus",
    )
    grace_s: float = Field(
        3600.0,
        ge=0,
        description="how long files of an earlier state stay for those who still read it, in seconds",
    )
    reuse: Reuse = Field(
        "object",
        description="which texts take vectors that are there: object, those of earlier versions of a file, "
        "of files that it may be a copy of, and repeats within a unit; corpus, those of the whole data set "
        "and repeats anywhere in the corpus, too, which is read twice for it; off, none",
    )

    @field_validator("reuse", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML takes the bare word for a truth value


class ResourcesSettings(Section):
    """What the job may use of the cluster."""

    address: str | None = Field(
        None,
        description="Ray address; null joins the cluster the job was submitted to, or starts a local one",
    )
    num_encoders: int | None = Field(
        None,
        ge=1,
        description="encoder actors; null takes one a GPU, or one a CPU core where there is no GPU",
    )
    gpus_per_encoder: float | None = Field(
        None, ge=0, description="GPUs of one encoder; null takes 1 if the cluster has GPUs, else 0"
    )
    num_readers: int | None = Field(
        None,
        ge=1,
        description="reading and tokenising tasks at once; null sizes them from the CPUs that are left",
    )
    threads_per_encoder: int | None = Field(
        None, ge=1, description="CPU threads of one encoder; null shares the cores of a node evenly"
    )
    max_unit_attempts: int = Field(
        24, ge=3, description="times a unit may take down its worker process before it is given up"
    )


class ReportSettings(Section):
    """What is told while the job runs and after it."""

    log_interval_s: float = Field(
        30.0, gt=0, description="seconds between log lines where there is no terminal"
    )
    price_per_hour: float | None = Field(
        None,
        ge=0,
        description="price of a device-hour (a GPU, or a CPU core where there is none), in your currency",
    )


class IndexSettings(Section):
    """Which FAISS index is built from the embedding shards."""

    _locations = field_validator("queries")(_check_location)

    build: bool = Field(False, description="build the index at the end of the embed job, too")
    factory: str = Field(
        "auto", description="FAISS factory string; auto chooses by vectors, dim and memory_bytes"
    )
    metric: Literal["l2", "ip"] = Field(
        "l2",
        description="how FAISS compares; scores are inner products either way, lossy codes do better with l2",
    )
    memory_bytes: int = Field(
        16_000_000_000,
        ge=1_000_000,
        description="what the index may take when searched, in bytes; decides auto",
    )
    layout: Literal["single", "ranges"] = Field(
        "single", description="one index file, or one a range of inverted lists, to be searched side by side"
    )
    part_bytes: int = Field(
        128_000_000,
        ge=100_000,
        description="most bytes of codes and ids that one add task makes; it holds them twice",
    )
    range_bytes: int = Field(
        256_000_000, ge=5_242_880, description="most bytes of a merge task, and of a file in layout ranges"
    )
    gpus_per_task: float = Field(
        0.0,
        ge=0,
        description="GPUs of the training and of each add task, which then find centroids and lists through "
        "torch; 0 leaves both to FAISS on CPUs",
    )
    recall_target: float = Field(
        0.95, gt=0, le=1, description="recall to reach by choosing nprobe or efSearch, as searches will ask"
    )
    recall_k: int | None = Field(
        None, ge=1, le=1000, description="k of recall_target; null takes search.k, 1000 at most"
    )
    rescore: int | None = Field(
        None,
        ge=0,
        description="candidates that searches score again for recall_k results, at least that many, or 0; "
        "null takes search.rescore, or what an auto factory needs, or else 0",
    )
    queries: str | None = Field(
        None,
        description="file, folder or glob of queries to measure recall with, as search.queries; null draws "
        "rows of the data set instead",
    )
    num_queries: int = Field(1000, ge=1, description="most queries that recall is measured with")
    max_drift: float = Field(
        0.3,
        ge=0,
        le=1,
        description="share of vectors out of place since the training above which the index is trained anew",
    )
    retrain: bool = Field(
        False, description="train anew on the data set as it is now, unless the published index was"
    )
    verify: bool = Field(
        False, description="read all files and parts of the index, and make those anew that are damaged"
    )

    @model_validator(mode="after")
    def _rescores_enough(self) -> "IndexSettings":
        if self.rescore and self.recall_k is not None and self.rescore < self.recall_k:
            raise ValueError(f"rescore: must be 0, or at least recall_k ({self.recall_k})")
        return self


def _check_weights(
    name: str, weights: tuple[float, ...] | None, of: str, names: tuple[str, ...] | None
) -> None:
    """Refuse weights that are not one for each of what they weigh, or that come to nothing."""
    if weights is None:
        return
    if len(weights) != len(names or ()):
        raise ValueError(f"{name}: must be one for each of {of}, which names {len(names or ())}")
    if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise ValueError(f"{name}: must be 0 or more, and above 0 together")


class SearchSettings(Section):
    """Which queries are searched for, how, and where the run goes."""

    _locations = field_validator("queries", "output")(_check_location)

    queries: str | None = Field(
        None,
        description="file, folder or glob of queries: JSONL, Parquet, CSV, or a folder in the BEIR layout",
    )
    id_column: str = Field(
        "auto", description="column of the query id; auto takes _id, query_id, qid or id, whichever is there"
    )
    text_column: str = Field(
        "auto", description="column of the query text; auto takes text, query or question"
    )
    output: str | None = Field(None, description="folder of run.parquet and run.trec on any fsspec URI")
    filter: str | None = Field(
        None,
        description="condition in SQL over kept columns of the data set (corpus.keep_columns) that results "
        "must pass, such as lang = 'de' AND year >= 2020; results are the k best of what passes",
    )
    filter_column: str | None = Field(
        None,
        description="column of the queries that holds for each a condition like search.filter, which its "
        "results must pass beside that; null or empty: none",
    )
    k: int = Field(100, ge=1, le=100_000, description="results a query")
    first_stage: FirstStage | Literal["hybrid"] = Field(
        "dense",
        description="what finds candidates: dense (vectors, by the index or exactly), sparse (weights of "
        "tokens) or bm25 (counts of tokens), outputs of the data set all; hybrid: several of them, fused",
    )
    hybrid: tuple[FirstStage, ...] | None = Field(
        None, description="first stages that hybrid fuses; null takes all that the data set has outputs for"
    )
    hybrid_weights: tuple[float, ...] | None = Field(
        None, description="of search.hybrid, in its order; null: all the same"
    )
    fusion: Literal["rrf", "minmax"] = Field(
        "rrf",
        description="how hybrid fuses: rrf, by reciprocal ranks; minmax, by scores, the best of a list as 1 "
        "and its worst as 0",
    )
    rrf_k: int = Field(60, ge=1, description="what is added to each rank by rrf")
    candidates: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="results a query that each first stage gives to be fused or scored again, at least k; "
        "null takes k",
    )
    rescore_with: tuple[Literal["embedding", "sparse", "colbert"], ...] = Field(
        (),
        description="outputs of the data set by which all candidates are scored again, exactly; the weighted "
        "mean of these scores, as FlagEmbedding's compute_score has it, gives the order",
    )
    rescore_weights: tuple[float, ...] | None = Field(
        None, description="of search.rescore_with, in its order; null: all the same"
    )
    bm25_k1: float = Field(1.2, ge=0, description="how slowly a token's count saturates in BM25")
    bm25_b: float = Field(
        0.75, ge=0, le=1, description="how much a passage's length counts in BM25; 0: not at all"
    )
    sparse: Literal["exact", "approximate"] = Field(
        "exact",
        description="how weights of tokens are searched: exact, by inverted lists; approximate, by Seismic "
        "(the extra seismic) where that reaches search.sparse_recall on queries of the run, else exactly",
    )
    sparse_recall: float = Field(
        0.95,
        gt=0,
        le=1,
        description="share of the exact results that search.sparse approximate must find, measured on up to "
        "200 queries of the run before it begins",
    )
    group: Literal["passage", "chunk"] = Field(
        "passage",
        description="what a result is where texts were cut: a passage, by its best chunk, or each chunk",
    )
    exact: bool = Field(
        False, description="search the embedding shards themselves; done anyway where there is no index"
    )
    nprobe: int | None = Field(
        None, ge=1, description="inverted lists to probe (or efSearch of HNSW); null takes the tuned value"
    )
    rescore: int | None = Field(
        None,
        ge=0,
        description="candidates from the index to score again from the stored vectors, at least k; 0: none; "
        "null takes what the index was tuned with, in proportion to k",
    )
    stale_index: bool = Field(
        False,
        description="search an index that lacks passages of the data set, which is refused otherwise",
    )
    rerank: bool = Field(
        False, description="rerank the results in the same job; the section rerank says with what"
    )
    unit_queries: int = Field(
        2000, ge=1, description="queries of one work unit, the piece that is searched at once"
    )
    num_searchers: int | None = Field(
        None, ge=1, description="actors that share the index; null sizes them from the CPUs"
    )
    replicas: int | None = Field(
        None,
        ge=1,
        description="how often the index is held, each time by actors of its own that answer other groups of "
        "queries; null: once, and on each node where it is one file",
    )
    tag: str = Field("bge-ray", min_length=1, description="name of the system, last column of a TREC run")
    max_rejected_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of queries without an answer above which the job counts as failed",
    )

    @model_validator(mode="after")
    def _fuses_something(self) -> "SearchSettings":
        if self.first_stage != "hybrid":
            for name in ("hybrid", "hybrid_weights", "fusion", "rrf_k"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: does nothing unless first_stage is hybrid")
            if self.candidates is not None and not self.rescore_with:
                raise ValueError("candidates: are k unless first_stage is hybrid, or rescore_with is set")
        elif self.hybrid is not None and not 2 <= len(self.hybrid) == len(set(self.hybrid)):
            raise ValueError("hybrid: must be different first stages, at least two")
        if self.candidates is not None and self.candidates < self.k:
            raise ValueError(f"candidates: must be at least k ({self.k})")
        if len(set(self.rescore_with)) != len(self.rescore_with):
            raise ValueError("rescore_with: an output is named twice")
        _check_weights("hybrid_weights", self.hybrid_weights, "hybrid", self.hybrid)
        _check_weights("rescore_weights", self.rescore_weights, "rescore_with", self.rescore_with)
        return self

    @model_validator(mode="after")
    def _searches_weights(self) -> "SearchSettings":
        if self.sparse == "exact":
            if self.sparse_recall != type(self).model_fields["sparse_recall"].default:
                raise ValueError("sparse_recall: does nothing unless sparse is approximate")
            return self
        stages = (self.hybrid or ("sparse",)) if self.first_stage == "hybrid" else (self.first_stage,)
        if "sparse" not in stages:
            raise ValueError(
                f"sparse: is of the weights of tokens, which {', '.join(stages)} does not search; "
                "leave it out"
            )
        if self.filter is not None or self.filter_column is not None:
            raise ValueError(
                "sparse: approximate knows no filter; set it to exact, or leave filter and filter_column out"
            )
        return self

    @model_validator(mode="after")
    def _rescores_enough(self) -> "SearchSettings":
        if self.rescore is not None and 0 < self.rescore < self.k:
            raise ValueError(f"rescore: must be 0, or at least k ({self.k})")
        if self.replicas and self.num_searchers and self.replicas > self.num_searchers:
            raise ValueError(f"replicas: must be at most num_searchers ({self.num_searchers})")
        if self.replicas and self.exact:
            raise ValueError("replicas: with exact no index is searched, so leave it out")
        if self.tag.split() != [self.tag]:
            raise ValueError("tag: must hold no white space, which separates the columns of a TREC run")
        return self


class RerankSettings(Section):
    """Which candidates are scored again, by which reranker, and where the run goes."""

    _locations = field_validator("model", "candidates", "output")(_check_location)

    model: str = Field(
        "BAAI/bge-reranker-base",
        description="hub id, folder or URI of a cross-encoder with one output, or of an LLM reranker",
    )
    revision: str | None = Field(None, description="hub commit, tag or branch")
    max_length: int | None = Field(
        None,
        ge=16,
        description="tokens of a pair, special tokens included, an LLM reranker's prompt not; null takes 512",
    )
    query_max_length: int | None = Field(
        None, ge=1, description="tokens kept of a query; null takes three quarters of rerank.max_length"
    )
    query_instruction: str | None = Field(
        None, description="text put before a query; null takes 'A: ' for an LLM reranker, else none"
    )
    passage_instruction: str | None = Field(
        None, description="text put before a passage; null takes 'B: ' for an LLM reranker, else none"
    )
    prompt: str | None = Field(
        None,
        min_length=1,
        description="question that an LLM reranker answers of each pair; null takes that of its authors",
    )
    cutoff_layers: tuple[int, ...] | None = Field(
        None,
        description="layers that score, ascending, of a layer-wise or lightweight reranker: later ones are "
        "not run, the last gives the score; null takes the model's last",
    )
    head_choice: Literal["position", "layer"] = Field(
        "position",
        description="which head of a lightweight reranker scores a cut-off layer: that of its position in "
        "the list, as FlagEmbedding has it, or that of the layer",
    )
    compress_ratio: Literal[1, 2, 4, 8] = Field(
        1, description="states of a passage that a lightweight reranker merges into one; 1 merges none"
    )
    compress_layers: tuple[int, ...] | None = Field(
        None, description="layers in front of which they are merged; null takes 8"
    )
    dtype: ComputeDtype | Auto = Field(
        "auto",
        description="compute dtype; auto is float32 on a CPU, and on a GPU float16, or bfloat16 for a Gemma",
    )
    kernels: Kernels | Auto = Field(
        "auto", description="as model.kernels, of a cross-encoder; an LLM reranker has plain ones alone"
    )
    token_budget: int | Auto = Field(
        "auto",
        description="tokens of one forward pass; auto is 1024 on a CPU, on a GPU what suits it and the model",
    )
    candidates: str | None = Field(
        None,
        description="a run (TREC or Parquet), or JSONL or Parquet with texts inline, also query, pos, neg",
    )
    output: str | None = Field(
        None, description="folder of the reranked run; null: reranked/ below search.output"
    )
    depth: int = Field(100, ge=1, description="candidates a query that are scored, the best first")
    first_stage_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share that a candidate's own score has in what the run is ordered by; its score and the "
        "reranker's are brought to 0..1 among those of a query that were scored; 0: the reranker alone",
    )
    texts: Literal["auto", "corpus", "kept"] = Field(
        "auto",
        description="where texts of bare ids come from: the corpus, or columns kept in the embedding shards; "
        "auto takes the latter if they are there",
    )
    reads: Literal["chunk", "passage"] = Field(
        "chunk",
        description="what of a passage that was cut into chunks is scored: the chunk that was found, or all "
        "of it, cut at max_length; a run without chunk_no, start and end names no chunk: all of it is scored",
    )
    unit_pairs: int = Field(
        4096, ge=1, description="pairs of one work unit, the piece that is committed, retried and resumed"
    )
    join_pairs: int = Field(
        200_000, ge=1, description="pairs whose texts are fetched together, by one pass over the corpus"
    )
    num_rerankers: int | None = Field(
        None, ge=1, description="reranker actors; null takes one a GPU, or sizes them from the CPUs"
    )
    gpus_per_reranker: float | None = Field(
        None, ge=0, description="GPUs of one reranker; null takes 1, 0.75 beside encoders, 0 without GPUs"
    )
    threads_per_reranker: int | None = Field(None, ge=1, description="CPU threads of one reranker")
    trust_remote_code: bool = Field(
        False, description="run Python code found in the model folder; off unless you trust its author"
    )
    max_rejected_fraction: float = Field(
        0.01, ge=0, le=1, description="share of pairs without a score above which the job counts as failed"
    )

    @model_validator(mode="after")
    def _budget_is_positive(self) -> "RerankSettings":
        if isinstance(self.token_budget, int) and self.token_budget < 1:
            raise ValueError("token_budget: must be at least 1 token")
        return self

    @model_validator(mode="after")
    def _layers_are_meant(self) -> "RerankSettings":
        cuts = self.cutoff_layers
        if cuts is not None and (not cuts or list(cuts) != sorted(set(cuts)) or cuts[0] < 1):
            raise ValueError("cutoff_layers: must be different layers from 1 on, ascending")
        if self.compress_layers is not None and self.compress_ratio == 1:
            raise ValueError("compress_layers: do nothing while compress_ratio is 1")
        if self.compress_layers is not None and min(self.compress_layers, default=0) < 1:
            raise ValueError("compress_layers: must be layers from 1 on")
        return self


class MineSettings(Section):
    """Which hard negatives are mined for which queries, and where the training files go.

    How candidates are searched for, the section search says; what a teacher is, the section rerank.
    """

    _locations = field_validator("queries", "qrels", "input", "held_out", "output")(_check_location)

    queries: str | None = Field(
        None, description="file, folder or glob of queries, as search.queries; needs mine.qrels"
    )
    qrels: str | None = Field(
        None, description="judgements, as evaluate.qrels: what is judged above 0 is a positive of its query"
    )
    input: str | None = Field(
        None,
        description="in place of queries and qrels: file, folder or glob of JSONL with query and pos, as "
        "FlagEmbedding trains on",
    )
    held_out: str | None = Field(
        None, description="queries that measure the trained model; equal texts are kept out of the training"
    )
    output: str | None = Field(
        None, description="folder of negatives.jsonl, tuples.parquet, lists.parquet and audit.parquet"
    )
    depth: int = Field(200, ge=1, le=10_000, description="results a query that are looked at")
    negatives: int = Field(7, ge=1, le=1000, description="negatives a query at most")
    skip: int = Field(
        0, ge=0, description="results at the top that are not taken, positives and dropped ones counted in"
    )
    sampling: Literal["top", "random"] = Field(
        "top", description="which of the results that are left are taken: the best, or any"
    )
    seed: int = Field(0, description="of random sampling; the same seed draws the same")
    copy_cosine: float | None = Field(
        0.95,
        gt=-1,
        le=1,
        description="a result with this cosine to a positive, or more, is a copy of it; null: not looked at",
    )
    copy_overlap: float | None = Field(
        0.7,
        gt=0,
        le=1,
        description="a result that shares this part of all words of both with a positive is a copy of it; "
        "null: not looked at",
    )
    relative_margin: float | None = Field(
        0.05,
        ge=0,
        description="part of the lowest positive's score, its sign left out, by which a negative must be "
        "below it; null: none",
    )
    absolute_margin: float | None = Field(
        None, ge=0, description="by how much a negative must be below the lowest positive's score"
    )
    max_score: float | None = Field(None, description="highest score of a negative")
    teacher: bool = Field(
        False,
        description="score what is left with a reranker, too, and write its scores; the section rerank says "
        "with which",
    )
    teacher_relative_margin: float | None = Field(
        0.05, ge=0, description="as relative_margin, of the teacher's scores"
    )
    teacher_absolute_margin: float | None = Field(
        None, ge=0, description="as absolute_margin, of the teacher's scores, which are logits"
    )
    max_rejected_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of queries that cannot be mined for above which the job counts as failed; those "
        "for which the rules left nothing are not among them",
    )

    @model_validator(mode="after")
    def _leaves_something(self) -> "MineSettings":
        if self.skip >= self.depth:
            raise ValueError(f"skip: must be less than depth ({self.depth})")
        return self


class MergeSettings(Section):
    """Which models become one, by which weights, and where it goes."""

    _locations = field_validator("models", "examples", "output")(_check_location)

    models: tuple[str, ...] | None = Field(
        None,
        min_length=2,
        description="folders, URIs of folders or hub ids of models of one architecture; the first one gives "
        "all but the weights",
    )
    weights: tuple[float, ...] | None = Field(
        None, description="of the models in their order, which sum to 1; null: all the same"
    )
    examples: str | None = Field(
        None,
        description="in place of weights: file, folder or glob of JSONL with query, pos and neg; the smaller "
        "a model's loss on them, the greater its weight",
    )
    temperature: float = Field(
        5.0,
        gt=0,
        description="by which losses are divided before the softmax that makes weights of them; 5 is that of "
        "LM-Cocktail and makes all nearly the same, 0.1 tells them apart",
    )
    output: str | None = Field(None, description="folder of the merged model on any fsspec URI")

    @model_validator(mode="after")
    def _weights_fit(self) -> "MergeSettings":
        if self.weights is None:
            return self
        if self.examples is not None:
            raise ValueError("examples: make the weights; leave merge.weights out")
        if self.models is None or len(self.weights) != len(self.models):
            raise ValueError("weights: must be one for each of merge.models")
        wrong = next((weight for weight in self.weights if not weight > 0), None)  # NaN is not above 0 either
        if wrong is not None:
            raise ValueError(f"weights: each must be above 0, {wrong:g} is not")
        if not abs(sum(self.weights) - 1) <= 1e-6:
            raise ValueError(f"weights: must sum to 1, not to {sum(self.weights):g}")
        return self


class TrainSettings(Section):
    """What a model is trained on, by which loss, and where it goes."""

    _locations = field_validator("data", "held_out", "output")(_check_location)

    kind: Literal["embedder", "reranker"] = Field(
        "embedder", description="what is trained: the model of model.name, or that of rerank.model"
    )
    data: str | None = Field(
        None,
        description="file, folder or glob of JSONL with query, pos and neg (of a teacher also pos_scores and "
        "neg_scores), such as negatives.jsonl of mine",
    )
    held_out: str | None = Field(
        None,
        description="JSONL of the same form by whose queries the model is measured before and after; those "
        "that the data has, too, are not trained on; null measures nothing",
    )
    output: str | None = Field(None, description="folder of the trained model on any fsspec URI")
    group: int = Field(
        8, ge=1, description="passages of a query: one of its positives, the others of its negatives"
    )
    batch_queries: int = Field(64, ge=1, description="queries of a step, those of all workers together")
    negatives: Literal["own", "worker", "all"] = Field(
        "all",
        description="what a query is compared with (embedder): its own group, or the groups of all queries "
        "of the step at its worker, or at all workers",
    )
    temperature: float = Field(0.02, gt=0, description="by which cosines are divided (embedder)")
    distill: Literal["none", "kl", "m3_kd"] = Field(
        "none",
        description="learn the teacher's scores, too: kl as FlagEmbedding's kl_div (beside the labels), "
        "m3_kd as its m3_kd_loss (in place of them, embedder)",
    )
    unified: bool = Field(
        False, description="train the sparse and the ColBERT head of bge-m3 with the dense one"
    )
    self_distill_after: int | None = Field(
        None, ge=0, description="with unified: step after which the three learn from their sum; null: never"
    )
    dims: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="Matryoshka: lengths to which embeddings may be cut; the loss is the mean of theirs"
    )
    cached_rows: int | None = Field(
        None,
        ge=1,
        description="rows of a forward pass; a batch of more is computed twice, piece by piece, in the "
        "memory of a piece, with the same gradient; null: all at once",
    )
    query_max_length: int | None = Field(
        None, ge=2, description="tokens kept of a query (embedder); null: as many as the model embeds with"
    )
    passage_max_length: int | None = Field(
        None, ge=2, description="tokens kept of a passage (embedder); null: as query_max_length"
    )
    epochs: int = Field(1, ge=1, description="times that the data is gone through")
    steps: int | None = Field(None, ge=1, description="number of steps, in place of epochs")
    learning_rate: float = Field(
        1e-5, gt=0, description="the greatest; it rises during the warm-up and falls to 0 from there"
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="length to which a longer gradient is cut")
    lora_rank: int | None = Field(
        None,
        ge=1,
        description="train matrices of this rank beside the weights (LoRA), which are added to them at the "
        "end; null trains all weights",
    )
    lora_alpha: float = Field(64.0, gt=0, description="LoRA: weight of the matrices, times 1 / lora_rank")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="what a forward pass computes in; weights and optimizer stay float32"
    )
    seed: int = Field(
        0, ge=0, description="of the order, the draws and dropout; the same seed, the same model"
    )
    workers: int = Field(1, ge=1, description="processes that share each step")
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs of a worker, 0 or whole; null: 1 where the cluster has GPUs"
    )
    checkpoint_steps: int = Field(
        200, ge=1, description="steps between two checkpoints, which is the most that a crash costs"
    )
    max_failures: int = Field(
        3, ge=0, description="times that lost workers are replaced before the run gives up"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "TrainSettings":
        if self.batch_queries % self.workers:
            raise ValueError(
                f"batch_queries {self.batch_queries}: must be a multiple of workers {self.workers}"
            )
        reranker = self.kind == "reranker"
        for name in ("unified", "dims", "query_max_length", "passage_max_length"):
            if reranker and getattr(self, name):
                raise ValueError(f"{name}: is of embedders; leave it out")
        if self.group < 2 and (reranker or self.negatives == "own" or self.distill != "none"):
            raise ValueError("group: must be at least 2 where a query is compared within its own group")
        if reranker and self.distill == "m3_kd":
            raise ValueError("distill m3_kd: is of embedders; kl is that of a reranker")
        if self.distill == "m3_kd" and self.negatives == "own":
            raise ValueError("distill m3_kd: compares a query with those of others; negatives: worker or all")
        if self.unified and (self.negatives == "own" or self.dims):
            raise ValueError("unified: goes with negatives worker or all, and without dims")
        if self.self_distill_after is not None and not self.unified:
            raise ValueError("self_distill_after: needs unified")
        return self


class MtebSettings(Section):
    """Which tasks of mteb measure which models, by whose rules, and where the results go.

    How a model runs, the sections model, chunking, output, index, search and rerank say, as for their jobs.
    """

    _locations = field_validator("beir", "models", "rerankers", "output")(_check_location)

    tasks: tuple[str, ...] | None = Field(None, min_length=1, description="names of mteb's tasks")
    benchmark: str | None = Field(
        None, description="name of a benchmark of mteb, such as MTEB(eng, v2), with all of its tasks"
    )
    beir: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="folders in the BEIR layout on any fsspec URI, each of which is a retrieval task",
    )
    models: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="encoders to be measured, named as model.name is; null takes model.name, unless there "
        "are mteb.rerankers, and then none",
    )
    rerankers: tuple[str, ...] = Field(
        (),
        description="rerankers to be measured, named as rerank.model is: on reranking tasks alone, on "
        "retrieval tasks behind each of the models",
    )
    rules: Literal["baai", "mteb"] = Field(
        "baai",
        description="which tasks get an instruction: as the model's authors evaluate it (its card), or as "
        "mteb's registry has it",
    )
    searches: tuple[Literal["exact", "index"], ...] = Field(
        ("exact",),
        min_length=1,
        description="how retrieval tasks are searched: exact, through an index (the section index says "
        "which), or both side by side",
    )
    output: str | None = Field(None, description="folder of the results on any fsspec URI")

    @model_validator(mode="after")
    def _names_are_different(self) -> "MtebSettings":
        for key in ("tasks", "beir", "models", "rerankers", "searches"):
            names = getattr(self, key) or ()
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{key}: {twice} is named twice")
        return self


class EvaluateSettings(Section):
    """Which runs are measured against which judgements."""

    _locations = field_validator("run", "qrels", "output")(_check_location)

    run: str | tuple[str, ...] | None = Field(
        None, description="a run file or folder, or a list of them; the others are compared with the first"
    )
    qrels: str | None = Field(
        None,
        description="judgements: TREC qrels, BEIR's tsv, or Parquet with its columns; or a folder with one; "
        "null compares several runs with each other",
    )
    output: str | None = Field(
        None,
        description="folder of metrics.json, metrics.md, metrics.svg, wins.svg and per_query.parquet; null "
        "writes none",
    )
    k: tuple[int, ...] = Field((1, 5, 10, 100), description="cut-offs of nDCG, MRR, recall and success")
    ignore_identical_ids: bool = Field(
        False,
        description="leave out results that have the id of their query, as where queries are passages",
    )

    @model_validator(mode="after")
    def _cuts_are_positive(self) -> "EvaluateSettings":
        if not self.k or min(self.k) < 1 or len(set(self.k)) != len(self.k):
            raise ValueError("k: must be different numbers, each at least 1")
        return self


class MigrateSettings(Section):
    """How a new data set takes the place of the one in use."""

    _locations = field_validator("pointer", "compare_with", "output")(_check_location)

    pointer: str | None = Field(
        None,
        description="folder that stands for the data set in use: search, rerank and mine take it as "
        "output.uri, ask, open_dataset and open_index as they take a data set",
    )
    compare_with: str | None = Field(
        None, description="data set to compare the new one with; null: the one that the pointer leads to"
    )
    output: str | None = Field(
        None, description="folder of both runs, of what evaluate says of them, and of migration.md"
    )
    move: bool = Field(False, description="move the pointer to output.uri when both have been compared")
    back: bool = Field(False, description="only move the pointer back to where it led before")
    max_loss: float | None = Field(
        None,
        ge=0,
        description="by how much nDCG, at the cut-off of evaluate.k nearest to 10, may be lower for the "
        "pointer to be moved, over the judged queries that one of the two answers; null: by anything",
    )

    @model_validator(mode="after")
    def _one_way(self) -> "MigrateSettings":
        if self.move and self.back:
            raise ValueError("move, back: only one of them")
        return self


class BenchSettings(Section):
    """What jobs/bench.py measures on this machine."""

    _locations = field_validator("output")(_check_location)

    shapes: tuple[Literal["minilm", "small", "base", "large"], ...] = Field(
        ("minilm",),
        description="models: minilm with its packaged weights, small to large as BGE has them, at random",
    )
    lengths: tuple[Literal["natural"] | int, ...] = Field(
        ("natural",), description="text lengths: natural, or so many tokens each"
    )
    rows: Annotated[int, Field(ge=64)] | Auto = Field(
        "auto",
        description="passages each contestant embeds, some over and over if need be; auto is 3000 on CPUs "
        "and 2000000 on a GPU",
    )
    pairs: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto",
        description="pairs each reranker scores, 0 for no reranker; auto is 2000 on CPUs, 200000 on a GPU",
    )
    files: int | None = Field(
        None, ge=1, description="files in which the corpus lies; null: as many as the job makes units of it"
    )
    repeats: int = Field(3, ge=1, description="runs of each contestant, in alternation; medians are shown")
    simulated_gpus: int = Field(
        0,
        ge=0,
        description="encoders that only sleep, to measure what one driver can feed; 0 leaves that out",
    )
    leave_out: tuple[str, ...] = Field((), description="contestants not to run, by name")
    output: str = Field("bench-out", description="folder for bench.json and bench.md")


class Settings(Section):
    """Every section; each job says which keys it cannot do without."""

    corpus: CorpusSettings = CorpusSettings()
    model: ModelSettings = ModelSettings()
    chunking: ChunkingSettings = ChunkingSettings()
    batching: BatchingSettings = BatchingSettings()
    output: OutputSettings = OutputSettings()
    resources: ResourcesSettings = ResourcesSettings()
    index: IndexSettings = IndexSettings()
    search: SearchSettings = SearchSettings()
    rerank: RerankSettings = RerankSettings()
    mine: MineSettings = MineSettings()
    merge: MergeSettings = MergeSettings()
    train: TrainSettings = TrainSettings()
    mteb: MtebSettings = MtebSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    migrate: MigrateSettings = MigrateSettings()
    report: ReportSettings = ReportSettings()
    bench: BenchSettings = BenchSettings()

    def require(self, *keys: str) -> None:
        """Refuse to go on without a value for each dotted key.

        Raises:
            SettingsError: a key is null; it names all of them.
        """
        missing = [key for key in keys if _lookup(self, key) is None]
        if missing:
            ways = " ".join(f"--set {key}=..." for key in missing)
            raise SettingsError(
                f"required setting {', '.join(missing)} is not set; give it in the config file or by {ways}"
            )


def _lookup(settings: Settings, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(settings, section), name)


def known_keys() -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, meaning) of every setting, in the order of the sections."""
    for section, field in Settings.model_fields.items():
        model = field.annotation
        if not (isinstance(model, type) and issubclass(model, Section)):
            raise TypeError(f"{section} is not a section")
        for name, spec in model.model_fields.items():
            default = (
                "null"
                if spec.default is None
                else yaml.safe_dump(_plain(spec.default), default_flow_style=True)
            )
            yield (
                f"{section}.{name}",
                _type_name(spec.annotation),
                default.split("\n")[0],
                spec.description or "",
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def parse_settings(
    document: str | None, overrides: Sequence[str] = (), origin: str = "the config"
) -> Settings:
    """Build the settings from YAML text and ``section.key=value`` overrides; later ones win.

    Args:
        document: YAML text, or None for defaults only.
        overrides: each ``section.key=value``. The value of a setting that takes any text is that text, to the
            last blank, unless it stands in quotes or is ``null``; others are read as YAML.
        origin: name of the document, for messages.

    Raises:
        SettingsError: not YAML, an unknown key (the nearest valid one is named), a wrong type or
            an impossible value.
    """
    # Before anything else, because every other message may repeat what was given.
    refuse_credentials(document or "", origin)
    for override in overrides:
        refuse_credentials(override, f"--set {override.partition('=')[0]}")
    try:
        tree = read_yaml(document) if document else {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{origin} is not valid YAML: {error}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict) or not all(isinstance(v, dict | None) for v in tree.values()):
        raise SettingsError(
            f"{origin}: expected sections with keys below them, such as `corpus:` and `  uri: ...`"
        )
    tree = {section: dict(keys or {}) for section, keys in tree.items()}
    for override in overrides:
        key, value = _parse_override(override)
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return parse_tree(tree)


def parse_tree(tree: dict[str, dict[str, Any]]) -> Settings:
    """Build the settings from sections with their keys.

    Raises:
        SettingsError: see `parse_settings`.
    """
    for section, keys in tree.items():
        for name, value in keys.items():
            refuse_credentials(str(value), f"{section}.{name}")
    _refuse_unknown(tree)
    tree = {
        section: {name: expand(value, f"{section}.{name}") for name, value in keys.items()}
        for section, keys in tree.items()
    }
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        lines = [_fault(one) for one in error.errors()]
        raise SettingsError("impossible setting: " + "; ".join(dict.fromkeys(lines))) from error


def _fault(found: Any) -> str:
    """Return what is wrong with a key; a rule of ours that spans several names them itself."""
    place, said = ".".join(map(str, found["loc"][:2])), found["msg"].removeprefix("Value error, ")
    return f"{place}.{said}" if len(found["loc"]) == 1 else f"{place}: {said} (got {found['input']!r})"


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or key.count(".") != 1:
        raise SettingsError(
            f"--set {override}: expected section.key=value, such as --set corpus.uri=s3://bucket/corpus"
        )
    key = key.strip()
    try:
        if _takes_text(key, text) and not (text[:1] in ("'", '"') and text[-1:] == text[:1]):
            return key, None if text in ("null", "~") else text
        return key, read_yaml(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {override}: the value is not valid YAML: {error}") from error


def _takes_text(key: str, text: str) -> bool:
    """Tell whether a setting takes this text as it stands; YAML might cut it, or see a number in it."""
    section, _, name = key.partition(".")
    field = Settings.model_fields.get(section)
    keys = {} if field is None else field.annotation.model_fields  # type: ignore[union-attr]
    kinds = _kinds(keys[name].annotation) if name in keys else set()
    return str in kinds and kinds <= {str, NoneType, tuple} and not (tuple in kinds and text.startswith("["))


def _refuse_unknown(tree: dict[str, dict[str, Any]]) -> None:
    known = [key for key, *_ in known_keys()]
    given = [f"{section}.{name}" for section, keys in tree.items() for name in keys]
    given += [section for section, keys in tree.items() if not keys and section not in Settings.model_fields]
    for key in given:
        if key in known:
            continue
        hint = _nearest_key(key, known)
        raise SettingsError(
            f"unknown setting {key}" + (f"; did you mean {hint}?" if hint else "; --help lists every key")
        )


def _nearest_key(key: str, known: list[str]) -> str | None:
    section, _, name = key.partition(".")
    same_name = [k for k in known if k.partition(".")[2] == name]
    if same_name:
        return same_name[0]
    in_section = {k.partition(".")[2]: k for k in known if k.startswith(f"{section}.")}
    if near := difflib.get_close_matches(name, in_section, n=1):
        return in_section[near[0]]
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.8)), None)


def settings_help(reads: Sequence[str] = tuple(Settings.model_fields)) -> str:
    """Return one line a setting of the given sections and single keys: dotted key, default and meaning."""
    rows = [row for row in known_keys() if row[0] in reads or row[0].partition(".")[0] in reads]
    rows.sort(key=lambda row: reads.index(row[0] if row[0] in reads else row[0].partition(".")[0]))
    width = max(len(key) for key, *_ in rows)
    return "\n".join(f"  {key:<{width}}  {meaning} [default: {default}]" for key, _, default, meaning in rows)
