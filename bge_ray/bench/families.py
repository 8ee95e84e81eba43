"""What a core makes of each family's shape, beside what a user would pick instead.

    python -m bge_ray.bench.families --out DIR [--only NAME ...] [--repeats 3] [--float32]

Weights are random, and of the layers of each real shape there are a few: a layer costs what a layer costs.
Texts are the docstrings of this Python, cut at 512 tokens by the tokenizer of all-MiniLM-L6-v2, which stands
for that of every family: all read the same tokens, and tables of words are as large as its. Pooling is mean,
where every layer does all of its work. Rerankers read one token of a row: our last layer does hardly
any: of the layers made it is a larger part than of all, so that their ratio is too good by that. Both
contestants of a family are loaded in one process of one thread, have run once before the clock starts, and
run one after the other, as often as asked, all families in turn; tokenising is a part of both. The clock is
the processor's, so that other work on a machine hardly counts.
What was measured is kept in DIR: a run that was stopped goes on with the same command.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from bge_ray.bench.machine import describe_machine
from bge_ray.bench.models import packaged_minilm
from bge_ray.formats.docstrings import find_docstrings
from bge_ray.model.feed.prompts import YES_OR_NO
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.modules import write_modules
from bge_ray.model.run.load import load_config
from bge_ray.model.run.model import Model, Place
from bge_ray.model.run.packed import can_pack
from bge_ray.model.spec import pair_feeder, resolve_encoder, resolve_reranker, text_feeder
from bge_ray.model.weights import weight_files
from bge_ray.records.model import ModelSpec
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import ComputeDtype, ModelSettings, RerankSettings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MAX_LENGTH = 512
# So many rows that this much is to be computed, and not fewer than two batches of the library's.
GFLOP, MIN_ROWS, MAX_ROWS = 300, 64, 1000

Role: TypeAlias = Literal["encoder", "cross_encoder", "llm_reranker"]
# What both contestants are given: texts, or pairs of a title and a text.
Pair: TypeAlias = tuple[str, str]


@dataclass(frozen=True)
class Shape:
    """A layer of a published model: ``layers`` of its ``of`` layers are made."""

    stands_for: str
    kind: str
    layers: int
    of: int
    sizes: dict[str, Any]
    role: Role = "encoder"
    dtype: ComputeDtype = "float32"


def _sizes(hidden: int, heads: int, inner: int, **more: int) -> dict[str, Any]:
    return {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": inner, **more}


def _grouped(hidden: int, heads: int, key_heads: int, head_dim: int, inner: int) -> dict[str, Any]:
    return _sizes(hidden, heads, inner, num_key_value_heads=key_heads, head_dim=head_dim)


# Sizes of the published models, of their config.json; language models in what they are used in.
SHAPES: dict[str, Shape] = {
    "bert-small": Shape("bge-small-en-v1.5", "bert", 3, 12, _sizes(384, 12, 1536)),
    "bert-base": Shape("bge-base-en-v1.5", "bert", 1, 12, _sizes(768, 12, 3072)),
    "xlm-roberta": Shape("bge-m3", "xlm-roberta", 1, 24, _sizes(1024, 16, 4096)),
    "mpnet": Shape("all-mpnet-base-v2", "mpnet", 1, 12, _sizes(768, 12, 3072)),
    "modernbert": Shape("gte-modernbert-base", "modernbert", 3, 22, _sizes(768, 12, 1152)),
    "nomic_bert": Shape("nomic-embed-text-v1.5", "nomic_bert", 1, 12, _sizes(768, 12, 3072)),
    "gemma3_text": Shape(
        "embeddinggemma-300m", "gemma3_text", 2, 24, _grouped(768, 3, 1, 256, 1152), dtype="bfloat16"
    ),
    "gemma2": Shape(
        "bge-multilingual-gemma2", "gemma2", 1, 42, _grouped(3584, 16, 8, 256, 14336), dtype="bfloat16"
    ),
    "mistral": Shape("bge-en-icl", "mistral", 1, 32, _grouped(4096, 32, 8, 128, 14336), dtype="bfloat16"),
    "qwen2": Shape(
        "bge-code-v1", "qwen2", 1, 28, _sizes(1536, 12, 8960, num_key_value_heads=2), dtype="bfloat16"
    ),
    "qwen3": Shape(
        "bge-reasoner-embed-qwen3-8b", "qwen3", 1, 36, _grouped(4096, 32, 8, 128, 12288), dtype="bfloat16"
    ),
    "cross-encoder": Shape(
        "bge-reranker-base", "xlm-roberta", 4, 12, _sizes(768, 12, 3072), role="cross_encoder"
    ),
    "llm-reranker": Shape(
        "bge-reranker-v2-gemma",
        "gemma",
        2,
        18,
        _grouped(2048, 8, 1, 256, 16384),
        role="llm_reranker",
        dtype="bfloat16",
    ),
}
_MAKERS: dict[Role, Any] = {
    "encoder": AutoModel,
    "cross_encoder": AutoModelForSequenceClassification,
    "llm_reranker": AutoModelForCausalLM,
}


@dataclass(frozen=True)
class Prepared:
    """Both contestants of a shape, loaded and warm; ``ours`` returns how many tokens it has read."""

    beside: str
    ours: Callable[[], int]
    theirs: Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """Of one family: what stood beside ours, the tokens of a run, and the CPU seconds of each of both."""

    beside: str
    dtype: str
    packed: bool
    rows: int
    tokens: int
    ours: list[float]
    theirs: list[float]


def make_model(shape: Shape, folder: Path) -> Path:
    """Save a random model of a shape with the packaged tokenizer; returns its folder."""
    tokenizer = Tokenizer.from_file(str(packaged_minilm() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if shape.role == "llm_reranker":  # an answer and a line break, which that of a BERT has no tokens for
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("Yes", "\n")])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk")},
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    sizes: dict[str, Any] = {
        **shape.sizes,
        "vocab_size": tokenizer.get_vocab_size(),
        "num_hidden_layers": shape.layers,
        "max_position_embeddings": MAX_LENGTH + 2,
        "pad_token_id": 0,
        "num_labels": 1,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.kind, **sizes)
    _MAKERS[shape.role].from_config(config).save_pretrained(folder)
    if shape.role == "encoder":
        write_modules(folder, "mean", shape.sizes["hidden_size"])
    return folder


def measure(shape: Shape, folder: Path) -> Measured:
    """Run both contestants of a shape once, one after the other."""
    rows = _rows(make_model(shape, folder))
    prepare = _prepare_encoders if shape.role == "encoder" else _prepare_rerankers
    both = prepare(shape, folder, rows)
    packed = can_pack(load_config(folder), torch.device("cpu"), getattr(torch, shape.dtype))
    started = time.process_time()
    tokens = both.ours()
    between = time.process_time()
    both.theirs()
    ended = time.process_time()
    return Measured(
        both.beside, shape.dtype, packed, len(rows), tokens, [between - started], [ended - between]
    )


def _rows(folder: Path) -> list[Pair]:
    """Return as many titles and texts as make up the work of a run."""
    shapes = weight_files(folder).shapes().items()
    weights = sum(math.prod(shape) for name, shape in shapes if "embed" not in name)
    wanted = GFLOP * 1e9 / (2 * weights)
    passages = [(title, text) for _, title, text in itertools.islice(find_docstrings(), MAX_ROWS)]
    lengths = TextFeeder(packaged_minilm(), MAX_LENGTH).passages([text for _, text in passages]).lengths
    enough = int((lengths.cumsum() < wanted).sum()) + 1
    return passages[: max(MIN_ROWS, enough)]


def load_library(shape: Shape, folder: Path) -> "SentenceTransformer":
    """Load a folder of `make_model` as sentence-transformers does, but for the tokenizer.

    Of that some types make one of their own, whatever the file says, and so other tokens of the same texts.
    """
    from sentence_transformers import SentenceTransformer

    library = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": shape.dtype})
    library[0].processor = PreTrainedTokenizerFast.from_pretrained(folder)
    library.max_seq_length = MAX_LENGTH
    return library


def _prepare_encoders(shape: Shape, folder: Path, rows: Sequence[Pair]) -> Prepared:
    texts = [text for _, text in rows]
    asked = ModelSettings(name=str(folder), dtype=shape.dtype, max_length=MAX_LENGTH)
    spec = resolve_encoder(asked, on_gpu=False)
    feeder, model = text_feeder(spec), _load(spec, folder)
    library = load_library(shape, folder)

    def theirs(texts: list[str] = texts) -> None:
        library.encode(texts, show_progress_bar=False)

    theirs(texts[:8])
    return Prepared("sentence-transformers", lambda: _run(model, feeder.passages(texts)), theirs)


def _prepare_rerankers(shape: Shape, folder: Path, rows: Sequence[Pair]) -> Prepared:
    queries, passages = [title for title, _ in rows], [text for _, text in rows]
    prompt = YES_OR_NO if shape.role == "llm_reranker" else None
    settings = RerankSettings(model=str(folder), dtype=shape.dtype, max_length=MAX_LENGTH, prompt=prompt)
    spec = resolve_reranker(settings, on_gpu=False)
    feeder, model = pair_feeder(spec), _load(spec, folder)
    pairs = [list(row) for row in rows]
    if shape.role == "cross_encoder":
        from sentence_transformers import CrossEncoder

        library = CrossEncoder(
            str(folder), device="cpu", max_length=MAX_LENGTH, model_kwargs={"dtype": shape.dtype}
        )
        beside, theirs = "CrossEncoder", lambda: library.predict(pairs, show_progress_bar=False)
        library.predict(pairs[:8], show_progress_bar=False)
    else:
        from FlagEmbedding import FlagLLMReranker

        halves = {"use_fp16": False, "use_bf16": shape.dtype == "bfloat16"}
        flag = FlagLLMReranker(str(folder), devices="cpu", max_length=MAX_LENGTH, **halves)
        # Of its own batch size, 128, the logits of all words at all tokens are larger than small machines.
        beside = "FlagLLMReranker, batches of 16"
        theirs = lambda: flag.compute_score(pairs, batch_size=16)  # noqa: E731
        flag.compute_score(pairs[:8], batch_size=16)
    return Prepared(beside, lambda: _run(model, feeder.pairs(queries, passages)), theirs)


def _load(spec: ModelSpec, folder: Path) -> Model:
    model = Model(spec, folder, Place("cpu", 1))
    model.warm_up(model.settle_budget("auto"))
    return model


def _run(model: Model, tokens: PackedTokens) -> int:
    """Run ours over rows, all outputs stored; returns how many tokens they have."""
    model.run(tokens, model.cut(tokens, model.settle_budget("auto")), model.empty_result(len(tokens)))
    return int(tokens.lengths.sum())


def to_markdown(found: dict[str, dict[str, Any]]) -> str:
    """Return the table: medians, and by how much ours is faster in them and in each turn."""
    lines = [
        "| shape of | layers | | runs | rows | tokens | tokens/s | beside it | times | in each turn |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, shape in SHAPES.items():
        if name not in found:
            continue
        one = Measured(**found[name])
        ours, theirs = (one.tokens / statistics.median(times) for times in (one.ours, one.theirs))
        turns = sorted(b / a for a, b in zip(one.ours, one.theirs, strict=True))
        cells = [
            f"{shape.stands_for} ({shape.kind})",
            f"{shape.layers} of {shape.of}",
            one.dtype,
            "packed" if one.packed else "padded",
            f"{one.rows:,}",
            f"{one.tokens:,}",
            f"{ours:,.0f}",
            f"{one.beside} {theirs:,.0f}",
            f"{ours / theirs:.2f}",
            f"{turns[0]:.2f} to {turns[-1]:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the shapes asked for that are not yet there, and print the table of all that are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--float32",
        action="store_true",
        help="of language models, too, where bfloat16 is emulated",
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / "families.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    for turn, name in itertools.product(range(asked.repeats), asked.only):
        before = found.get(name, {"ours": [], "theirs": []})
        if len(before["ours"]) <= turn:
            shape = replace(SHAPES[name], dtype="float32") if asked.float32 else SHAPES[name]
            with tempfile.TemporaryDirectory(prefix="bge-ray-bench-") as work:
                once = asdict(measure(shape, Path(work) / "m"))
            found[name] = once | {who: before[who] + once[who] for who in ("ours", "theirs")}
            path.write_text(json.dumps(found, indent=1))
    machine = describe_machine()
    where = f"{machine['cpu']}, one thread, torch {machine['torch']}"
    print(f"{where}\n\n{to_markdown(found)}")  # noqa: T201


if __name__ == "__main__":
    main()
