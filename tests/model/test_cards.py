"""Cards against FlagEmbedding's own files, and against the table of facts."""

import pytest
from pydantic import ValidationError

from bge_ray.model.cards import ModelCard, cards, find_card

ENGLISH = "Represent this sentence for searching relevant passages: "
CHINESE = "为这个句子生成表示以用于检索相关文章："  # noqa: RUF001 - the full-width colon is meant


@pytest.mark.parametrize("version", ["", "-v1.5"])
@pytest.mark.parametrize(
    ("name", "dim", "instruction"),
    [
        ("bge-small-en", 384, ENGLISH),
        ("bge-base-en", 768, ENGLISH),
        ("bge-large-en", 1024, ENGLISH),
        ("bge-small-zh", 512, CHINESE),
        ("bge-base-zh", 768, CHINESE),
        ("bge-large-zh", 1024, CHINESE),
    ],
)
def test_bge(name: str, version: str, dim: int, instruction: str) -> None:
    card = cards()[f"BAAI/{name}{version}"]
    assert (card.dim, card.max_length, card.pooling, card.query_prefix()) == (dim, 512, "cls", instruction)
    assert card.languages == (name[-2:],)


def test_others() -> None:
    m3 = cards()["BAAI/bge-m3"]
    assert (m3.dim, m3.max_length, m3.pooling, m3.query_prefix()) == (1024, 8192, "cls", "")
    assert m3.outputs == ("embedding", "sparse", "colbert")
    assert cards()["BAAI/bge-large-zh-noinstruct"].query_prefix() == ""
    assert all(card.outputs == ("score",) for card in cards().values() if card.family.endswith("reranker"))


@pytest.mark.parity
def test_what_flagembedding_says_of_a_model_is_on_its_card() -> None:
    from FlagEmbedding.inference.embedder.model_mapping import AUTO_EMBEDDER_MAPPING

    n_compared = 0
    for card in cards().values():
        known = AUTO_EMBEDDER_MAPPING.get(card.id.rpartition("/")[2])
        if known is None:
            continue
        n_compared += 1
        assert card.pooling == known.pooling_method.value, card.id
        before, _, behind = card.query_template.partition("{query}")
        assert before.replace("{instruction}", "{}") + "{}" == known.query_instruction_format, card.id
        # FlagICLModel keeps it apart, as its suffix.
        assert behind == ("\n<response>" if card.id == "BAAI/bge-en-icl" else ""), card.id
        # Code that it asks for is needed, or done without by a class of transformers.
        assert not known.trust_remote_code or card.needs_remote_code or card.clears_auto_map, card.id
    assert n_compared >= 40


@pytest.mark.parity
def test_both_sides_of_each_task_of_llm_embedder_are_its_authors() -> None:
    card = cards()["BAAI/llm-embedder"]
    assert list(card.prompts) == ["qa", "icl", "chat", "lrlm", "tool", "convsearch"]
    for prompts in card.prompts.values():
        assert prompts.query.endswith(": ") and prompts.passage.endswith(": ")
    assert card.prompts["qa"].query == card.query_instruction
    assert card.prompts["qa"].passage == card.passage_instruction


@pytest.mark.parametrize(
    ("name", "task", "kind", "instruction"),
    [
        ("bge-large-en-v1.5", "NFCorpus", "Retrieval", ENGLISH),
        ("bge-large-en-v1.5", "ArguAna", "Retrieval", ""),
        ("bge-large-en-v1.5", "QuoraRetrieval", "Retrieval", ""),
        ("bge-large-en-v1.5", "AskUbuntuDupQuestions", "Reranking", ""),
        ("bge-large-en-v1.5", "STS12", "STS", ""),
        ("bge-large-zh-v1.5", "T2Retrieval", "Retrieval", CHINESE),
        ("bge-large-zh-v1.5", "T2Reranking", "Reranking", CHINESE),
        ("bge-large-zh-v1.5", "TNews", "Classification", ""),
        ("bge-m3", "MIRACLRetrieval", "Retrieval", ""),
        ("e5-base-v2", "NFCorpus", "Retrieval", "query: "),
    ],
)
def test_evaluated_as_its_authors_do(name: str, task: str, kind: str, instruction: str) -> None:
    card = find_card(name)
    assert card is not None and card.instruction_for(task, kind) == instruction


def test_a_template_takes_any_instruction() -> None:
    card = cards()["Qwen/Qwen3-Embedding-0.6B"]
    assert card.query_prefix("Find {code}") == "Instruct: Find {code}\nQuery:"
    assert card.query_prefix("") == ""


@pytest.mark.parametrize(
    "change",
    [
        {"dim": None},
        {"dim": 3, "outputs": ("score",)},
        {"query_template": "{query} {instruction}"},
        {"revision": "main"},
        {"family": "transformer"},
        {"pool": "cls"},
    ],
)
def test_a_wrong_record_is_refused(change: dict[str, object]) -> None:
    right = {"id": "a/b", "family": "dense", "dim": 3, "max_length": 5, "languages": ("en",)}
    ModelCard(**right)
    with pytest.raises(ValidationError):
        ModelCard(**{**right, **change})


@pytest.mark.parametrize(
    "name",
    [
        "BAAI/bge-base-en-v1.5",
        "/models/bge-base-en-v1.5",
        "/models/bge-base-en-v1.5/",
        "me/BGE-base-en-v1.5",
        "/runs/bge-base-en-v1.5/checkpoint-500",
        "/root/.cache/huggingface/hub/models--BAAI--bge-base-en-v1.5/snapshots/a5beb1e3e68b9ab74eb54cfd186867f64f240e1a",
    ],
)
def test_a_folder_named_like_the_model(name: str) -> None:
    card = find_card(name)
    assert card is not None and card.id == "BAAI/bge-base-en-v1.5"


def test_names_with_capitals_are_found_in_folders() -> None:
    card = find_card("/models/qwen3-embedding-0.6b")
    assert card is not None and card.id == "Qwen/Qwen3-Embedding-0.6B"


@pytest.mark.parametrize(
    "name", ["", "/", "intfloat/e5-base-v3", "/models/mine", "bge-base-en-v1.5-tuned", "checkpoint-5"]
)
def test_unknown(name: str) -> None:
    assert find_card(name) is None
