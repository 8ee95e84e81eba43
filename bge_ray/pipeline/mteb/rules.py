"""What stands before a text in a task of mteb, by the rules of the model's authors or of mteb's registry."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from bge_ray.model.cards import Evaluation, find_card
from bge_ray.pipeline.mteb.package import mteb
from bge_ray.records.model import ModelSpec

# What mteb says of a text: a query, a document, or neither, as in all tasks but those of searching.
Side: TypeAlias = Literal["query", "document"] | None


@dataclass(frozen=True)
class Rules:
    """By whose rules a model is measured; ``prompts`` are those that mteb's registry has for it."""

    kind: Literal["baai", "mteb"]
    evaluation: Evaluation
    query: str
    document: str
    prompts: tuple[tuple[str, str], ...] = ()

    def instruction(self, metadata: Any, side: Side) -> str:
        """Return what is put before a text, or for a query of a model with a template the instruction in it.

        Args:
            metadata: of the task, as mteb has it.
            side: what the text is.
        """
        if self.kind == "mteb":
            from mteb.models.abs_encoder import get_prompt
            from mteb.types import PromptType

            found = get_prompt(dict(self.prompts), metadata, PromptType(side) if side else None)
            return str(found or "")
        if side == "document":
            return self.document
        instructed = metadata.type in self.evaluation.instructed
        excepted = metadata.name in self.evaluation.except_tasks
        return self.query if side == "query" and instructed and not excepted else ""


def settle_rules(kind: Literal["baai", "mteb"], spec: ModelSpec) -> tuple[Rules, str | None]:
    """Return the rules for a model, and what a person should know of them.

    Without a card the rules of its authors are not known: then queries of all tasks of searching get the
    instruction that the folder or the settings have. A model that mteb's registry does not know has the
    same prompts there, for queries and for documents.
    """
    query, document = spec.query_instruction, spec.passage_instruction
    card = find_card(spec.name)
    evaluation = (card.evaluation if card is not None else None) or Evaluation()
    if kind == "baai":
        note = None
        if card is not None and evaluation.by_task:
            note = (
                f"its authors give each task a sentence of its own, which is not known here; all tasks have "
                f"{query[:60]!r}"
            )
        return Rules(kind, evaluation, query, document), note
    prompts, note = _registered(spec.name if card is None else card.id)
    if prompts is None:
        prompts = {"query": query, "document": document}
    return Rules(kind, evaluation, query, document, _pairs(prompts)), note


def _pairs(prompts: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, text) for name, text in prompts.items() if text))


def _registered(name: str) -> tuple[dict[str, str] | None, str | None]:
    """Return the prompts of a model in mteb's registry, and what a person should know; None: not known.

    Models whose loader puts a sentence for each task into a template have no prompts that could be looked up.
    """
    meta = mteb.models.model_implementations.MODEL_REGISTRY.get(name)
    if meta is None:
        return None, "mteb's registry does not know it: its own instructions are taken"
    if meta.loader_kwargs.keys() & {"instruction_template", "prompts_dict"}:
        return (
            None,
            "mteb gives it a sentence for each task by code of its own: its own instructions are taken",
        )
    return dict(meta.loader_kwargs.get("model_prompts") or {}), None
