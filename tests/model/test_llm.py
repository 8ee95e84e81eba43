"""LLM embedders: token ids and vectors are FlagEmbedding's, and every text ends with what is pooled."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bge_ray.errors import DatasetMismatchError, ModelError
from bge_ray.model.cards import cards
from bge_ray.model.spec import asked_of_queries, resolve_encoder, text_feeder
from bge_ray.records.model import ModelSpec
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import ModelSettings
from tests.model.conftest import encode, load, resolve, run, vectors
from tests.support.models import SENTENCES, make_decoder, make_encoder
from tests.support.slow import slow_but

pytestmark = pytest.mark.long

TASK = "Given a web search query, retrieve relevant passages that answer the query."
EXAMPLES = [
    {"instruction": TASK, "query": "how do I read a file?", "response": "line by line in python"},
    {"query": "向量 {0}", "response": "faiss searches vectors\nparquet stores columns"},
]
PLACES = "<instruct>{instruction}\n<query>{query}"

MakeDecoder = Callable[[str], Path]


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeDecoder:
    """Model type to the folder of a random decoder whose tokenizer puts an end token."""
    root = tmp_path_factory.mktemp("llm")
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_decoder(root / kind, kind)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def odd_texts(texts: list[str]) -> list[str]:
    """Short, long, overlong and odd ones, an empty one, and such as spell special tokens."""
    return [*texts, "", " ", "\n", "a</s> b", "<s>", "<|endoftext|>", "tail ", " lead", "😀 ﬁ"]


def token_rows(tokens: PackedTokens) -> list[list[int]]:
    pairs = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    return [tokens.input_ids[a:b].tolist() for a, b in pairs]


def query_vectors(spec: ModelSpec, texts: Sequence[str], budget: int, packed: bool) -> np.ndarray:
    result = run(load(spec, packed=packed), text_feeder(spec).queries(texts), budget)
    assert not result.faults
    return vectors(result)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "max_length"),
    slow_but([("qwen3", 40)], [("mistral", 40), ("gemma2", 256), ("qwen2", 256), ("qwen3", 40)]),
)
def test_vectors_equal_flagembedding(
    decoder_folder: MakeDecoder, odd_texts: list[str], kind: str, max_length: int
) -> None:
    from FlagEmbedding import FlagLLMModel

    folder = decoder_folder(kind)
    theirs = FlagLLMModel(
        str(folder),
        use_fp16=False,
        devices="cpu",
        query_instruction_for_retrieval=TASK,
        query_instruction_format="<instruct>{}\n<query>{}",
        query_max_length=max_length,
        passage_max_length=max_length,
        batch_size=8,
    )
    spec = resolve(folder, max_length=max_length, query_template=PLACES, query_instruction=TASK)
    passages, queries = theirs.encode_corpus(odd_texts), theirs.encode_queries(odd_texts)
    for packed, budget in ((True, 300), (False, 300), (True, 1)):
        ours = run(load(spec, packed=packed), text_feeder(spec).passages(odd_texts), budget)
        assert not ours.faults
        np.testing.assert_allclose(vectors(ours), passages, atol=1e-5, rtol=0)
        np.testing.assert_allclose(query_vectors(spec, odd_texts, budget, packed), queries, atol=1e-5, rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("examples", [[], EXAMPLES], ids=["without", "with"])
@pytest.mark.parametrize("kind", slow_but(["mistral"], ["mistral", "qwen2"]))
def test_examples_equal_flagembedding_token_by_token(
    decoder_folder: MakeDecoder, odd_texts: list[str], kind: str, examples: list[dict[str, str]]
) -> None:
    from FlagEmbedding import FlagICLModel

    folder = decoder_folder(kind)
    theirs = FlagICLModel(
        str(folder),
        use_fp16=False,
        devices="cpu",
        query_instruction_for_retrieval=TASK,
        examples_for_task=[
            {"instruct": e.get("instruction", TASK), "query": e["query"], "response": e["response"]}
            for e in examples
        ]
        or None,
        query_max_length=80,
        batch_size=1,
    )
    seen: list[list[int]] = []
    theirs.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    expected = theirs.encode_queries(odd_texts)
    spec = resolve(
        folder,
        max_length=80,
        query_template=PLACES + "\n<response>",
        query_instruction=TASK,
        examples=examples,
    )
    tokens = text_feeder(spec).queries(odd_texts)
    # Theirs ran the longest text twice, to find a batch size, and then all by length.
    ours = sorted(token_rows(tokens), key=lambda row: (-len(row), row))
    assert ours == sorted(seen[1:], key=lambda row: (-len(row), row))
    np.testing.assert_allclose(query_vectors(spec, odd_texts, 300, True), expected, atol=1e-5, rtol=0)
    assert tokens.truncated.any() and not tokens.truncated.all()


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "qwen2", "qwen3"])
def test_truncation_keeps_the_token_that_is_pooled(
    decoder_folder: MakeDecoder, odd_texts: list[str], tmp_path: Path, kind: str
) -> None:
    mended = make_decoder(tmp_path / "m", kind, ends=False)
    for folder, settings in ((decoder_folder(kind), {}), (mended, {"last_token": END[kind]})):
        spec = resolve(folder, max_length=20, **settings)
        feeder = text_feeder(spec)
        for tokens in (feeder.passages(odd_texts), feeder.queries(odd_texts)):
            assert tokens.lengths.max() == 20
            ends = {row[-1] for row in token_rows(tokens)}
            assert ends == {feeder._tokenizer.convert_tokens_to_ids(END[kind])}
    whole = text_feeder(resolve(decoder_folder(kind), max_length=20)).passages(odd_texts)
    added = text_feeder(resolve(mended, max_length=20, last_token=END[kind])).passages(odd_texts)
    assert token_rows(whole) == token_rows(added)
    assert whole.truncated.tolist() == added.truncated.tolist()


END = {"mistral": "</s>", "gemma2": "<eos>", "qwen2": "<|endoftext|>", "qwen3": "<|endoftext|>"}


def rewrite(folder: Path, name: str, **changes: object) -> Path:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("ends", "config", "settings", "expected"),
    [
        (True, {}, {}, ("<s>", "</s>")),
        (True, {"add_eos_token": True}, {}, ("<s>", "</s>")),
        # What transformers 4 put there and 5 leaves out.
        (False, {"add_eos_token": True}, {}, ("<s>", "</s>")),
        (False, {}, {"last_token": "</s>"}, ("<s>", "</s>")),
        (False, {}, {"last_token": ""}, ("<s>", None)),
        (False, {}, {"pooling": "mean"}, (None, None)),
        (True, {"add_eos_token": False}, {"last_token": "</s>"}, ("<s>", "</s>")),
        (True, {"add_eos_token": False}, {}, "says add_eos_token: false; set model.last_token"),
        (True, {"add_bos_token": False}, {}, "says add_bos_token: false; make the two agree"),
        (False, {}, {}, "would read a word: .* Set model.last_token"),
        (False, {"tokenizer_class": "Qwen2Tokenizer", "add_eos_token": True}, {}, "add_eos_token: true. Set"),
        (True, {}, {"last_token": "<pad>"}, "model.last_token says that texts end with '<pad>'"),
        (True, {}, {"last_token": ""}, "model.last_token says that texts end with ''"),
        (False, {}, {"last_token": "<eos>"}, "its vocabulary has no <eos>"),
    ],
)
def test_what_a_text_ends_with(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    ends: bool,
    config: dict[str, object],
    settings: dict[str, Any],
    expected: tuple[str | None, str | None] | str,
) -> None:
    folder = make_decoder(tmp_path / "m", "mistral", ends=ends)
    rewrite(folder, "tokenizer_config.json", **({"tokenizer_class": "LlamaTokenizer"} | config))
    if isinstance(expected, str):
        with pytest.raises(ModelError, match=expected):
            resolve(folder, **settings)
        return
    spec = resolve(folder, **settings)
    assert (spec.first_token, spec.last_token) == expected
    added = not ends and expected[1] is not None
    assert ("</s> is added, which is what is pooled" in caplog.text) == added
    # The words themselves are what the file without an end makes of them.
    row = token_rows(text_feeder(spec).passages(["the fox"]))[0]
    plain = make_decoder(tmp_path / "plain", "mistral", ends=False)
    bare = token_rows(text_feeder(resolve(plain, last_token="")).passages(["the fox"]))[0]
    assert row == bare + [2] * (expected[1] is not None)


def test_a_begin_that_only_the_flag_asks_for_is_added(tmp_path: Path) -> None:
    folder = make_decoder(tmp_path / "m", "mistral")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    single = tokenizer["post_processor"]["single"]
    tokenizer["post_processor"]["single"] = [
        p for p in single if p.get("SpecialToken", {}).get("id") != "<s>"
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    expected = make_decoder(tmp_path / "whole", "mistral")
    rewrite(folder, "tokenizer_config.json", tokenizer_class="LlamaTokenizer", add_bos_token=True)
    ours, theirs = (text_feeder(resolve(f, max_length=9)).passages(SENTENCES) for f in (folder, expected))
    assert token_rows(ours) == token_rows(theirs)


def test_a_card_decides_and_is_contradicted_by_name(tmp_path: Path) -> None:
    named = make_decoder(tmp_path / "bge-multilingual-gemma2", "gemma2", ends=False)
    spec = resolve(named)
    assert (spec.family, spec.last_token, spec.pooling) == ("llm", "<eos>", "last_token")
    assert spec.around_query() == (f"<instruct>{TASK}\n<query>", "")
    assert resolve(named, query_instruction="A {task}").around_query()[0] == "<instruct>A {task}\n<query>"
    assert resolve(named, query_instruction="").around_query() == ("", "")
    with pytest.raises(ModelError, match="give the task alone"):
        resolve(named, query_instruction="<instruct>A task\n<query>")
    other = make_decoder(tmp_path / "Qwen3-Embedding-0.6B", "mistral")
    with pytest.raises(ModelError, match=r"its card says that texts end with '<\|endoftext\|>'"):
        resolve(other)
    icl = make_decoder(tmp_path / "bge-en-icl", "mistral")
    assert resolve(icl).around_query() == (f"<instruct>{TASK}\n<query>", "\n<response>")


@pytest.mark.parametrize("prompt", ["Instruct: find it\nQuery: ", "Search: ", None])
def test_a_prompt_of_the_folder_wins_over_its_card(tmp_path: Path, prompt: str | None) -> None:
    folder = make_decoder(tmp_path / "e5-mistral-7b-instruct", "mistral")
    prompts = {"prompts": {"query": prompt, "document": ""}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    spec = resolve(folder)
    card = cards()["intfloat/e5-mistral-7b-instruct"]
    assert spec.around_query() == (prompt or card.query_prefix(), "")
    assert spec.query_instruction == {"Search: ": "Search: ", None: card.query_instruction}.get(
        prompt, "find it"
    )


def test_what_is_computed_in(decoder_folder: MakeDecoder) -> None:
    def on_gpu(kind: str, **settings: Any) -> str:
        return resolve_encoder(ModelSettings(name=str(decoder_folder(kind)), **settings), on_gpu=True).dtype

    assert [on_gpu(kind) for kind in ("gemma2", "mistral")] == ["bfloat16", "float16"]
    assert on_gpu("gemma2", dtype="float32") == "float32"
    assert resolve(decoder_folder("gemma2")).dtype == "float32"


def test_code_of_the_folder_is_not_left_out_in_silence(tmp_path: Path) -> None:
    folder = make_decoder(tmp_path / "m", "qwen2")
    rewrite(folder, "config.json", auto_map={"AutoModel": "modeling_qwen.Qwen2Model"})
    with pytest.raises(ModelError, match="auto_map"):
        resolve(folder)
    vouched = tmp_path / "gte-Qwen2-1.5B-instruct"
    shutil.copytree(folder, vouched)
    assert resolve(vouched).last_token == "<|endoftext|>"
    both_ways = tmp_path / "gte-Qwen2-7B-instruct"
    shutil.copytree(folder, both_ways)
    with pytest.raises(ModelError, match=r"is not causal, and its config\.json says otherwise"):
        resolve(both_ways)
    assert resolve(rewrite(both_ways, "config.json", is_causal=False)).pooling == "last_token"


def test_settings_of_llm_embedders_are_refused_elsewhere(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "m")
    with pytest.raises(ModelError, match=r"model.examples, model.last_token: .* is no LLM embedder"):
        resolve(folder, examples=EXAMPLES, last_token="")
    with pytest.raises(ModelError, match=r"model.task qa: .* it has no tasks"):
        resolve(folder, task="qa")
    with pytest.raises(ModelError, match=r"model.query_template"):
        asked_of_queries(resolve(folder), ModelSettings(query_template=PLACES))


TASKS = {
    "qa": (
        "Represent this query for retrieving relevant documents: ",
        "Represent this document for retrieval: ",
    ),
    "icl": (
        "Convert this example into vector to look for useful examples: ",
        "Convert this example into vector for retrieval: ",
    ),
    "chat": (
        "Embed this dialogue to find useful historical dialogues: ",
        "Embed this historical dialogue for retrieval: ",
    ),
    "lrlm": (
        "Embed this text chunk for finding useful historical chunks: ",
        "Embed this historical text chunk for retrieval: ",
    ),
    "tool": (
        "Transform this user request for fetching helpful tool descriptions: ",
        "Transform this tool description for retrieval: ",
    ),
    "convsearch": (
        "Encode this query and context for searching relevant passages: ",
        "Encode this passage for retrieval: ",
    ),
}


def test_tasks_of_llm_embedder(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "llm-embedder")
    for task, both in TASKS.items():
        spec = resolve(folder, task=task)
        assert (spec.query_instruction, spec.passage_instruction) == both
        feeder, plain = (
            text_feeder(spec),
            text_feeder(resolve(folder, query_instruction="", passage_instruction="")),
        )
        assert token_rows(feeder.queries(["fox"])) == token_rows(plain.queries([both[0] + "fox"]))
        assert token_rows(feeder.passages(["fox"])) == token_rows(plain.passages([both[1] + "fox"]))
    assert resolve(folder).query_instruction == TASKS["qa"][0]
    assert resolve(folder, task="tool", query_instruction="mine").query_instruction == "mine"
    with pytest.raises(ModelError, match=r"model.task search: .* its tasks are qa, icl, chat"):
        resolve(folder, task="search")
    named = ModelSettings(task="chat")  # whose model is that of the data set
    assert asked_of_queries(resolve(folder, task="chat"), named) == resolve(folder, task="chat")
    with pytest.raises(DatasetMismatchError, match="search with the task they were embedded for"):
        asked_of_queries(resolve(folder, task="qa"), named)


def test_queries_are_asked_in_another_way_later(decoder_folder: MakeDecoder) -> None:
    spec = resolve(decoder_folder("mistral"), query_template=PLACES, query_instruction="old")
    asked = ModelSettings(query_instruction="new", examples=EXAMPLES)
    found = asked_of_queries(spec, asked)
    assert found.around_query() == ("<instruct>new\n<query>", "")
    assert [e.instruction for e in found.examples] == [TASK, "new"]
    assert asked_of_queries(found, ModelSettings()) == found
    assert encode(decoder_folder("mistral"), ["fox"]).faults == {}
