"""What the files of a model folder say of it: configuration, sentence-transformers' files, names of weights.

It reads no weight and knows no torch.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_ray.errors import ModelError
from bge_ray.model.weights import weight_files
from bge_ray.settings.sections import Pooling

POOLING_FILE = "1_Pooling/config.json"
KNOWN_MODULES = {"Transformer", "Pooling", "Normalize"}
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
_POOLINGS: dict[str, Pooling] = {
    "cls": "cls",
    "cls_token": "cls",
    "mean": "mean",
    "mean_tokens": "mean",
    "lasttoken": "last_token",
    "last_token": "last_token",
}


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
        return _read_json(self.path / "config.json")

    @functools.cached_property
    def weights(self) -> frozenset[str]:
        """Names of all weights.

        Raises:
            ModelError: there are none, or a file of them cannot be read.
        """
        return weight_files(self.path).names()

    @property
    def positions(self) -> int | None:
        """How many tokens the model has positions for; None if its config.json does not say."""
        positions = self.config.get("max_position_embeddings")
        if not isinstance(positions, int) or positions < 1:
            return None
        return positions - (2 if self.config.get("model_type") in OFFSET_POSITION_TYPES else 0)

    @property
    def hidden_size(self) -> int:
        """Length of a token's state.

        Raises:
            ModelError: config.json does not say.
        """
        dim = self.config.get("hidden_size", self.config.get("dim"))  # DistilBERT calls it dim
        if not isinstance(dim, int) or dim < 1:
            raise ModelError(f"{self.path}/config.json: no hidden_size")
        return dim

    @property
    def n_labels(self) -> int:
        """How many outputs a classification head has, as transformers reads config.json."""
        labels = self.config.get("id2label")
        return len(labels) if isinstance(labels, dict) else int(self.config.get("num_labels", 2))

    def pooling(self) -> Pooling | None:
        """Return the pooling that sentence-transformers' file says; None if there is none.

        Raises:
            ModelError: it is one that is not supported.
        """
        config = self._optional(POOLING_FILE)
        modes = [
            key.removeprefix("pooling_mode_")
            for key, on in config.items()
            if key.startswith("pooling_mode_") and on is True
        ]
        if isinstance(config.get("pooling_mode"), str):
            modes = [config["pooling_mode"]]
        if len(modes) == 1 and modes[0] in _POOLINGS:
            return _POOLINGS[modes[0]]
        if modes:
            raise ModelError(
                f"{self.path}: pooling {modes} is not supported; "
                "set model.pooling to cls, mean or last_token if it fits"
            )
        return None

    def trained_length(self) -> int | None:
        """Return the most tokens of a text that sentence-transformers' files say; None if they do not."""
        trained = self._optional("sentence_bert_config.json").get("max_seq_length")
        if not trained and (self.path / "modules.json").is_file():
            # Its version 6 keeps the limit with the tokenizer.
            trained = self._optional("tokenizer_config.json").get("model_max_length")
        return int(trained) if trained else None

    def prompts(self) -> dict[str, str | None]:
        """Return sentence-transformers' prompts by name.

        Raises:
            ModelError: they are no map of texts.
        """
        name = "config_sentence_transformers.json"
        prompts = self._optional(name).get("prompts") or {}
        if not isinstance(prompts, dict) or not all(
            isinstance(text, str | None) for text in prompts.values()
        ):
            raise ModelError(f"{self.path}/{name}: prompts is not a map of texts")
        return prompts

    def check_modules(self) -> None:
        """Refuse a folder whose sentence-transformers modules do more than pool and normalise.

        Raises:
            ModelError: names what its vectors would lack.
        """
        path = self.path / "modules.json"
        if not path.is_file():
            return
        try:
            modules = [(str(m["type"]), str(m["path"])) for m in json.loads(path.read_text())]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{path}: not a list of modules: {error!r}") from error
        unknown = [kind for kind, _ in modules if kind.rpartition(".")[2] not in KNOWN_MODULES]
        # The place of each module is part of the claim: what is not looked at must not decide a vector.
        unknown += [
            f"{kind} in {place}"
            for kind, place in modules
            if (kind.endswith(".Pooling") and f"{place}/config.json" != POOLING_FILE)
            or (kind.endswith(".Transformer") and place)
        ]
        if unknown:
            raise ModelError(
                f"{self.path}: modules {unknown} are not supported; its vectors would not be its authors'"
            )
        if self._optional("sentence_bert_config.json").get("do_lower_case"):
            raise ModelError(
                f"{self.path}: sentence_bert_config.json asks for do_lower_case, which is not supported"
            )
        if self._optional(POOLING_FILE).get("include_prompt") is False:
            raise ModelError(
                f"{self.path}: pools without its prompt (include_prompt), which is not supported"
            )

    def _optional(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return _read_json(path) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return value
