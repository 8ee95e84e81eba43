"""What the files of a model folder say of it: configuration, sentence-transformers' files, names of weights.

It reads no weight and knows no torch.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_ray.errors import ModelError
from bge_ray.model.modules import (
    MODULES_FILE,
    POOLING_FILE,
    Modules,
    read_modules,
    read_object,
    read_pooling,
    transformer_config,
)
from bge_ray.model.weights import weight_files

PROMPTS_FILE = "config_sentence_transformers.json"
# The names of the prompts that sentence-transformers looks for, in this order.
QUERY_PROMPTS = ("query",)
PASSAGE_PROMPTS = ("document", "passage", "corpus")
# These count positions from padding_idx + 1, so two of their position embeddings are never used.
OFFSET_POSITION_TYPES = {
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "data2vec-text",
    "mpnet",
}


# What configurations call the length of a token's state: most of them, DistilBERT, GPT-2, XLNet and XLM.
HIDDEN_NAMES = ("hidden_size", "dim", "n_embd", "d_model", "emb_dim")


@dataclass(frozen=True)
class ModelFolder:
    """A folder that `source.fetch_model` returned, and its commit on the hub."""

    path: Path
    revision: str | None = None

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            ModelError: it cannot be read.
        """
        return read_object(self.path / "config.json")

    @functools.cached_property
    def weights(self) -> frozenset[str]:
        """Names of all weights.

        Raises:
            ModelError: there are none, or a file of them cannot be read.
        """
        return frozenset(weight_files(self.path).shapes())

    @property
    def positions(self) -> int | None:
        """How many tokens the model has positions for; None if its config.json does not say."""
        # GPT-2 calls them n_positions.
        positions = self.config.get("max_position_embeddings", self.config.get("n_positions"))
        if not isinstance(positions, int) or positions < 1:
            return None
        return positions - (2 if self.config.get("model_type") in OFFSET_POSITION_TYPES else 0)

    @property
    def hidden_size(self) -> int:
        """Length of a token's state.

        Raises:
            ModelError: config.json does not say.
        """
        dim = next((self.config[name] for name in HIDDEN_NAMES if name in self.config), None)
        if not isinstance(dim, int) or dim < 1:
            raise ModelError(
                f"{self.path}/config.json: none of {', '.join(HIDDEN_NAMES)} says how many numbers a token's "
                "state has"
            )
        return dim

    @property
    def vocab_size(self) -> int | None:
        """How many tokens the model knows; None if its config.json does not say."""
        size = self.config.get("vocab_size")
        return size if isinstance(size, int) else None

    @property
    def n_labels(self) -> int:
        """How many outputs a classification head has, as transformers reads config.json."""
        labels = self.config.get("id2label")
        return len(labels) if isinstance(labels, dict) else int(self.config.get("num_labels", 2))

    @functools.cached_property
    def modules(self) -> Modules | None:
        """What follows the transformer, as sentence-transformers' files say; None if there are none.

        Raises:
            ModelError: names what is not done here, and would make other vectors.
        """
        return read_modules(self.path)

    @property
    def truncate_dim(self) -> int | None:
        """To how many numbers sentence-transformers' files have a vector cut; None if they do not.

        Raises:
            ModelError: it is no such number.
        """
        dim = self._optional(PROMPTS_FILE).get("truncate_dim")
        if dim is None:
            return None
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
            raise ModelError(f"{self.path}/{PROMPTS_FILE}: truncate_dim {dim!r} is no length of a vector")
        return dim

    def pooling(self) -> str | None:
        """Return the pooling that sentence-transformers' files say, as `Modules` has it; None if they do not.

        Raises:
            ModelError: it is one that the library does not have.
        """
        if self.modules is not None:
            return self.modules.pooling
        return read_pooling(self._optional(POOLING_FILE), self.path)

    def trained_length(self) -> int | None:
        """Return the most tokens of a text that sentence-transformers' files say; None if they do not."""
        trained = transformer_config(self.path).get("max_seq_length")
        if not trained and (self.path / MODULES_FILE).is_file():
            # Its version 6 keeps the limit with the tokenizer.
            trained = self._optional("tokenizer_config.json").get("model_max_length")
        return int(trained) if trained else None

    @property
    def lower_cases(self) -> bool:
        """Whether sentence-transformers lower-cases texts before the tokenizer does what it does."""
        return bool(transformer_config(self.path).get("do_lower_case"))

    def code_files(self) -> list[str]:
        """Return which configurations name Python code of the folder."""
        names = ("config.json", "tokenizer_config.json")
        return [name for name in names if self._optional(name).get("auto_map")]

    def prompts(self) -> dict[str, str | None]:
        """Return sentence-transformers' prompts by name.

        Raises:
            ModelError: they are no map of texts.
        """
        prompts = self._optional(PROMPTS_FILE).get("prompts") or {}
        if not isinstance(prompts, dict) or not all(
            isinstance(text, str | None) for text in prompts.values()
        ):
            raise ModelError(f"{self.path}/{PROMPTS_FILE}: prompts is not a map of texts")
        return prompts

    def instructions(self) -> tuple[str, str]:
        """Return what sentence-transformers' files put before a query and before a passage; empty if nothing.

        A side without a prompt of its own takes the default one, unless that is the other side's.

        Raises:
            ModelError: they are no texts, or the default names one that is not there.
        """
        prompts, default = self.prompts(), self._default_name()

        def of_side(own: tuple[str, ...], other: tuple[str, ...]) -> str:
            names = own if default is None or default in other else (*own, default)
            # The library writes empty prompts by default, which say nothing about the model.
            return next((text for text in map(prompts.get, names) if text), "")

        return of_side(QUERY_PROMPTS, PASSAGE_PROMPTS), of_side(PASSAGE_PROMPTS, QUERY_PROMPTS)

    def default_prompt(self) -> str:
        """Return what sentence-transformers' files put before every text, or pair of texts; empty if nothing.

        Raises:
            ModelError: as `instructions`.
        """
        default = self._default_name()
        return (self.prompts().get(default) if default is not None else None) or ""

    def _default_name(self) -> str | None:
        default, names = self._optional(PROMPTS_FILE).get("default_prompt_name"), list(self.prompts())
        if default is not None and default not in (*names, *QUERY_PROMPTS, *PASSAGE_PROMPTS):
            raise ModelError(
                f"{self.path}/{PROMPTS_FILE}: default_prompt_name {default!r} is none of {names}"
            )
        return None if default is None else str(default)

    def _optional(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return read_object(path) if path.is_file() else {}
