"""Cards against the table of facts in FlagEmbedding's own files."""

import pytest

from bge_ray.model.cards import CARDS, find_card

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
    card = CARDS[f"BAAI/{name}{version}"]
    assert (card.dim, card.max_length, card.pooling, card.query_instruction) == (dim, 512, "cls", instruction)
    assert card.language == name[-2:]


def test_others() -> None:
    m3 = CARDS["BAAI/bge-m3"]
    assert (m3.dim, m3.max_length, m3.pooling, m3.query_instruction) == (1024, 8192, "cls", "")
    assert CARDS["BAAI/bge-large-zh-noinstruct"].query_instruction == ""
    assert len(CARDS) == 14


@pytest.mark.parity
def test_every_card_is_known_to_flagembedding() -> None:
    from FlagEmbedding.inference.embedder.model_mapping import AUTO_EMBEDDER_MAPPING

    for card in CARDS.values():
        name = card.id.removeprefix("BAAI/")
        if name in AUTO_EMBEDDER_MAPPING:
            assert AUTO_EMBEDDER_MAPPING[name].pooling_method.value == card.pooling
        else:
            assert name == "bge-large-zh-noinstruct"


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


@pytest.mark.parametrize(
    "name", ["", "/", "intfloat/e5-base-v2", "/models/mine", "bge-base-en-v1.5-tuned", "checkpoint-5"]
)
def test_unknown(name: str) -> None:
    assert find_card(name) is None
