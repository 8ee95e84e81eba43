"""What is known about each published model by its id: the records of `cards.yaml`, checked as they are read.

A folder's own files win over its card; a card says what no file does, such as the instruction for queries.
"""

import functools
from importlib import resources
from typing import Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from bge_ray.settings.sections import ComputeDtype, Pooling

CardFamily: TypeAlias = Literal[
    "dense", "m3", "llm", "cross_encoder", "llm_reranker", "layerwise_reranker", "lightweight_reranker"
]
# What mteb calls the kinds of tasks in which a query looks for passages.
SEARCHING = ("Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prompts(_Record):
    """What a kind of task puts before a query and before a passage; ``task`` is a reranker's question."""

    query: str = ""
    passage: str = ""
    task: str = ""


class Evaluation(_Record):
    """How the model's authors evaluate it.

    ``instructed`` names the kinds of tasks (as mteb does) in which queries get the instruction, but for
    ``except_tasks``. ``by_task``: each task has a sentence of its own, which stands in no card.
    """

    instructed: tuple[str, ...] = SEARCHING
    except_tasks: tuple[str, ...] = ()
    by_task: bool = False
    normalize: bool = True


class ModelCard(_Record):
    """Facts about one published model.

    Args:
        id: on the hub.
        family: kind of checkpoint, as `families` name theirs.
        outputs: what one forward pass can give.
        dim: length of an embedding; None of a reranker.
        parameters: how many weights; None if nobody says.
        max_length: tokens it is used with, special tokens included; None if nobody says.
        pooling: tokens to one vector; None where only the folder says.
        query_template: a query as the model reads it, of ``{instruction}`` and ``{query}``.
        query_instruction: what stands for ``{instruction}`` unless asked otherwise.
        passage_instruction: put before a passage.
        prompts: by kind of task, where the model knows several.
        last_token: what every text ends with, for a pooling that reads it.
        causal: whether a token sees only those before it; None as the folder says.
        dtype: in which its authors use it on a GPU.
        languages: ISO 639-1 codes, or ``multilingual``, or ``code``.
        licence: SPDX identifier or the hub's word; None if not known here.
        revision: a commit known to exist; its weights are safetensors where ``safetensors`` says so.
        safetensors: whether they are; None if not known.
        clears_auto_map: the folder names Python code, and transformers' own class does the same.
        needs_remote_code: the folder runs with its own Python code only.
        refused: why it is not run at all.
        evaluation: its authors' rules; None if not known.
    """

    id: str
    family: CardFamily
    outputs: tuple[str, ...] = ("embedding",)
    dim: int | None = Field(None, ge=1)
    parameters: int | None = Field(None, ge=1)
    max_length: int | None = Field(None, ge=1)
    pooling: Pooling | None = None
    query_template: str = "{instruction}{query}"
    query_instruction: str = ""
    passage_instruction: str = ""
    prompts: dict[str, Prompts] = {}
    last_token: str | None = None
    causal: bool | None = None
    dtype: ComputeDtype = "float16"
    languages: tuple[str, ...]
    licence: str | None = None
    revision: str | None = Field(None, pattern="^[0-9a-f]{40}$")
    safetensors: bool | None = None
    clears_auto_map: bool = False
    needs_remote_code: bool = False
    refused: str | None = None
    evaluation: Evaluation | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> "ModelCard":
        if ("embedding" in self.outputs) != (self.dim is not None):
            raise ValueError("dim: an embedding has one, and nothing else")
        if "{instruction}" not in self.query_template.partition("{query}")[0]:
            raise ValueError("query_template: takes {instruction}, and {query} behind it")
        return self

    def query_prefix(self, instruction: str | None = None) -> str:
        """Return what stands before a query, for an instruction other than the card's if one is given.

        Without any instruction nothing stands there.
        """
        instruction = self.query_instruction if instruction is None else instruction
        # By hand: an instruction may hold braces.
        template = self.query_template.partition("{query}")[0]
        return template.replace("{instruction}", instruction) if instruction else ""

    def instruction_for(self, task_name: str, task_type: str) -> str:
        """Return the instruction that the model's authors give the queries of a task.

        Args:
            task_name: as mteb calls it, such as ArguAna.
            task_type: as mteb calls it, such as Retrieval or STS.
        """
        rules = self.evaluation or Evaluation()
        instructed = task_type in rules.instructed and task_name not in rules.except_tasks
        return self.query_instruction if instructed else ""


@functools.cache
def cards() -> dict[str, ModelCard]:
    """Return all cards by id."""
    text = resources.files(__package__).joinpath("cards.yaml").read_text(encoding="utf-8")
    records: dict[str, dict[str, Any]] = yaml.safe_load(text)["cards"]
    return {card_id: ModelCard(id=card_id, **record) for card_id, record in records.items()}


def find_card(name: str) -> ModelCard | None:
    """Return the card of a hub id, or of a local folder named like the model; None if unknown.

    A training checkpoint goes by the folder above it, a folder of the hub's cache by the id in its path.
    """
    if name in cards():
        return cards()[name]
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    if parts and parts[-1].startswith("checkpoint-"):
        parts.pop()
    if len(parts) > 2 and parts[-2] == "snapshots":
        parts = parts[-3].split("--")
    return _by_name().get(parts[-1].lower()) if parts else None


@functools.cache
def _by_name() -> dict[str, ModelCard]:
    return {card_id.rpartition("/")[2].lower(): card for card_id, card in cards().items()}
