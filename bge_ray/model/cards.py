"""What is known about each BGE encoder by its id: pooling, length, and the instruction for queries.

Source: FlagEmbedding's model table and ``inference/embedder/model_mapping.py``; the instruction texts
are in no machine-readable file of the models, which is why they stand here. A folder's own files
win over its card.
"""

from dataclasses import dataclass

from bge_ray.settings.sections import Pooling

ENGLISH_INSTRUCTION = "Represent this sentence for searching relevant passages: "
CHINESE_INSTRUCTION = "为这个句子生成表示以用于检索相关文章："  # noqa: RUF001 - the full-width colon is meant


@dataclass(frozen=True)
class ModelCard:
    """Facts about one published model; ``dim`` is the length of its vectors."""

    id: str
    dim: int
    max_length: int
    pooling: Pooling
    query_instruction: str
    language: str


def _bge(size: str, dim: int, language: str) -> list[ModelCard]:
    instruction = ENGLISH_INSTRUCTION if language == "en" else CHINESE_INSTRUCTION
    names = [f"bge-{size}-{language}", f"bge-{size}-{language}-v1.5"]
    return [ModelCard(f"BAAI/{name}", dim, 512, "cls", instruction, language) for name in names]


CARDS: dict[str, ModelCard] = {
    card.id: card
    for card in [
        *_bge("small", 384, "en"),
        *_bge("base", 768, "en"),
        *_bge("large", 1024, "en"),
        *_bge("small", 512, "zh"),
        *_bge("base", 768, "zh"),
        *_bge("large", 1024, "zh"),
        # Trained to match without an instruction on either side.
        ModelCard("BAAI/bge-large-zh-noinstruct", 1024, 512, "cls", "", "zh"),
        ModelCard("BAAI/bge-m3", 1024, 8192, "cls", "", "multilingual"),
    ]
}

_BY_NAME = {card_id.rpartition("/")[2]: card for card_id, card in CARDS.items()}


def find_card(name: str) -> ModelCard | None:
    """Return the card of a hub id, or of a local folder named like the model; None if unknown.

    A training checkpoint goes by the folder above it, a folder of the hub's cache by the id in its path.
    """
    if name in CARDS:
        return CARDS[name]
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    if parts and parts[-1].startswith("checkpoint-"):
        parts.pop()
    if len(parts) > 2 and parts[-2] == "snapshots":
        parts = parts[-3].split("--")
    return _BY_NAME.get(parts[-1].lower()) if parts else None
