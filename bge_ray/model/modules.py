"""What sentence-transformers' files say becomes of the states of tokens: modules in their order. No torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from bge_ray.errors import ModelError
from bge_ray.model.pointers import refuse_pointer

MODULES_FILE = "modules.json"
POOLING_FILE = "1_Pooling/config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# The names under which versions of the library kept what its first module takes.
TRANSFORMER_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
# Its flags in the order in which it lays their vectors side by side, and our names of them.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last_token",
}
_MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last_token",
}
_REFUSED = {
    "Router": "queries and documents take different ways through it",
    "Asym": "queries and documents take different ways through it",
    "StaticEmbedding": "it is a table of word vectors, without a transformer",
    "SparseStaticEmbedding": "it is a table of word weights, without a transformer",
    "WordEmbeddings": "it is a table of word vectors, without a transformer",
    "BoW": "it counts words, without a transformer",
    "WordWeights": "tokens are weighed by a table of its own",
    "CNN": "it is a network of another kind on top of the states of tokens",
    "LSTM": "it is a network of another kind on top of the states of tokens",
    "WeightedLayerPooling": "it mixes the states of all layers",
    "CLIPModel": "it reads pictures",
    "SpladePooling": "its vectors are sparse",
    "SparseAutoEncoder": "its vectors are sparse",
    "MLMTransformer": "its vectors are sparse",
    "MultiVectorMask": "it makes a vector of each token",
}
_LIBRARY = "sentence_transformers."
# What the library hands on to transformers when it loads a model, under its present and its older names, and
# what of it changes no vector here: precision and attention are settings, and padding is our own business.
_LOADING = (
    *("model_kwargs", "config_kwargs", "processor_kwargs"),
    *("model_args", "config_args", "tokenizer_args"),
)
_WITHOUT_EFFECT = {
    "attn_implementation",
    "cache_dir",
    "device_map",
    "dtype",
    "local_files_only",
    "low_cpu_mem_usage",
    "padding_side",
    "revision",
    "token",
    "torch_dtype",
    "trust_remote_code",
    "use_cache",
    "use_fast",
    "use_safetensors",
}


@dataclass(frozen=True)
class Linear:
    """A linear layer and an activation; ``weights`` is the file of its tensors."""

    weights: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str
    residual: bool


@dataclass(frozen=True)
class LayerNorm:
    """A layer norm; ``weights`` is the file of its tensors."""

    weights: Path
    dimension: int


@dataclass(frozen=True)
class Normalize:
    """Scaling to unit L2 norm."""


Step: TypeAlias = Linear | LayerNorm | Normalize


@dataclass(frozen=True)
class Modules:
    """The way from the states of tokens to a vector.

    ``pooling`` joins with ``+`` what is laid side by side, as `heads.Pooled` takes it. ``pools_prompt``: the
    tokens of a prompt count as those of the text do. ``steps`` follow the pooling.
    """

    pooling: str
    pools_prompt: bool
    steps: tuple[Step, ...]

    @property
    def ends_normalized(self) -> bool:
        """Whether the vectors have unit norm."""
        return bool(self.steps) and isinstance(self.steps[-1], Normalize)

    @property
    def inner_steps(self) -> tuple[Step, ...]:
        """The steps without a normalisation at their end."""
        return self.steps[:-1] if self.ends_normalized else self.steps

    def dim(self, hidden_size: int, pooling: str, folder: Path) -> int:
        """Return the length of a vector made of states with a pooling.

        Raises:
            ModelError: a module takes vectors of another length.
        """
        dim = pooled_dim(hidden_size, pooling)
        for step in self.steps:
            if isinstance(step, Normalize):
                continue
            takes = step.in_features if isinstance(step, Linear) else step.dimension
            if takes != dim:
                raise ModelError(
                    f"{folder}: {step.weights.parent.name} takes vectors of {takes} numbers, and those "
                    f"before it have {dim} ({pooling} pooling of states of {hidden_size})"
                )
            dim = step.out_features if isinstance(step, Linear) else dim
        return dim


def pooled_dim(hidden_size: int, pooling: str) -> int:
    """Return how many numbers a pooling makes of states."""
    return hidden_size * len(pooling.split("+"))


def read_modules(folder: Path) -> Modules | None:
    """Read what follows the transformer of a folder; None if sentence-transformers did not write it.

    Raises:
        ModelError: names what is not done here, and would make other vectors.
    """
    listed = list_modules(folder)
    if listed is None:
        return None
    for kind, place in listed:
        _refuse_unknown(folder, kind, place)
    kinds = [kind.rpartition(".")[2] for kind, _ in listed]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds.count("Transformer") + kinds.count("Pooling") != 2:
        raise ModelError(
            f"{folder}: its modules are {', '.join(kinds)}; what is done here is a Transformer, a Pooling, "
            "and any of Dense, LayerNorm and Normalize"
        )
    if listed[0][1]:
        raise ModelError(
            f"{folder}: its model lies in {listed[0][1]}, as sentence-transformers before 2.0 laid it; load "
            "it with a later version and save it again"
        )
    _check_transformer(folder)
    pooling = read_object(folder / listed[1][1] / "config.json")
    steps = [_step(folder / place, kind) for kind, (_, place) in zip(kinds[2:], listed[2:], strict=True)]
    return Modules(
        pooling=read_pooling(pooling, folder) or "mean",  # as the library takes it where nothing is said
        pools_prompt=pooling.get("include_prompt") is not False,
        steps=tuple(step for step in steps if step is not None),
    )


def list_modules(folder: Path) -> list[tuple[str, str]] | None:
    """Return type and place of each module, of which there are some; None without a list of them.

    Raises:
        ModelError: modules.json is no such list.
    """
    path = folder / MODULES_FILE
    if not path.is_file():
        return None
    try:
        refuse_pointer(path)
        listed = [(str(m["type"]), str(m["path"])) for m in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path}: not a list of modules: {error!r}") from error
    if not listed or any(Path(place).is_absolute() or ".." in Path(place).parts for _, place in listed):
        raise ModelError(f"{path}: not a list of modules of its folder")
    return listed


def module_files(folder: Path) -> list[Path]:
    """Return the files below a folder that say how vectors come of states, weights included.

    Raises:
        ModelError: modules.json cannot be read.
    """
    found = {folder / POOLING_FILE}
    for kind, place in list_modules(folder) or ():
        name = kind.rpartition(".")[2]
        if name in ("Pooling", "Dense", "LayerNorm"):
            found.add(folder / place / "config.json")
        if name in ("Dense", "LayerNorm"):
            found.update(path for path in (_weights_of(folder / place),) if path is not None)
    return sorted(path for path in found if path.is_file())


def read_pooling(config: dict[str, Any], folder: Path) -> str | None:
    """Return the pooling that a configuration of sentence-transformers says; None if it says none.

    Raises:
        ModelError: it is one that the library does not have.
    """
    said = config.get("pooling_mode")
    if said is None:
        modes = [name for flag, name in _FLAGS.items() if config.get(flag) is True]
        unknown = [
            key
            for key, on in config.items()
            if key.startswith("pooling_mode_") and key not in _FLAGS and on is True
        ]
    else:
        said = [said] if isinstance(said, str) else said
        unknown = [mode for mode in said if mode not in _MODES]
        modes = [_MODES[mode] for mode in said if mode in _MODES]
    if unknown:
        raise ModelError(f"{folder}: pooling {unknown} is none that sentence-transformers has")
    return "+".join(modes) or None


def read_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        ModelError: it cannot be read, or is no object.
    """
    try:
        refuse_pointer(path)
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return value


def transformer_config(folder: Path) -> dict[str, Any]:
    """Return what sentence-transformers keeps of the transformer itself; empty if nothing."""
    paths = (folder / name for name in TRANSFORMER_FILES)
    return next((read_object(path) for path in paths if path.is_file()), {})


def _refuse_unknown(folder: Path, kind: str, place: str) -> None:
    name = kind.rpartition(".")[2]
    if not kind.startswith(_LIBRARY):
        raise ModelError(f"{folder}: its module {kind} is code of its own, which is not run here")
    if name in _REFUSED:
        raise ModelError(f"{folder}: its module {name} is not supported: {_REFUSED[name]}")
    if name not in ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout"):
        raise ModelError(f"{folder}: its module {kind} in {place or '.'} is not supported")


def _check_transformer(folder: Path) -> None:
    """Refuse what the first module may be told, and is not done here."""
    config = transformer_config(folder)
    said = {
        "transformer_task": ("feature-extraction",),
        "module_output_name": ("token_embeddings",),
        "query_length": (),
        "document_length": (),
        "query_expansion": (),
        "processing_kwargs": (),
    }
    for key, fine in said.items():
        value = config.get(key)
        if value and value not in fine:
            raise ModelError(f"{folder}: its transformer has {key} {value!r}, which is not supported")
    for key in _LOADING:
        told = {name: value for name, value in (config.get(key) or {}).items() if name not in _WITHOUT_EFFECT}
        if told:
            raise ModelError(
                f"{folder}: sentence-transformers loads its transformer with {key} {told}, which is not done "
                f"here; write them into config.json or tokenizer_config.json, and take them out of {key}"
            )
    kinds = config.get("modality_config") or {}
    if "message" in kinds:
        raise ModelError(f"{folder}: its texts are put into a chat template, which is not supported")
    text = kinds.get("text", {})
    if kinds and (text.get("method"), text.get("method_output_name")) != ("forward", "last_hidden_state"):
        raise ModelError(f"{folder}: its vectors are made of {text or 'no text'}, which is not supported")


def _step(place: Path, kind: str) -> Step | None:
    """Return what a module behind the pooling does; None if that is nothing."""
    if kind == "Dropout":
        return None
    config = read_object(place / "config.json") if (place / "config.json").is_file() else {}
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ModelError(
                f"{place}: its {key} is {config[key]}, and not sentence_embedding: it makes a vector of each "
                "token, or one of several outputs, which is not supported"
            )
    if kind == "Normalize":
        return Normalize()
    weights = _weights_of(place)
    if weights is None:
        raise ModelError(f"{place}: has no weights: neither {' nor '.join(WEIGHTS)}")
    try:
        if kind == "LayerNorm":
            return LayerNorm(weights, int(config["dimension"]))
        return Linear(
            weights,
            in_features=int(config["in_features"]),
            out_features=int(config["out_features"]),
            bias=bool(config.get("bias", True)),
            activation=_activation(config.get("activation_function"), place),
            residual=bool(config.get("use_residual", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{place}/config.json: says nothing of its size: {error!r}") from error


def _activation(said: Any, place: Path) -> str:
    """Return the name in torch.nn of an activation."""
    if said is None:
        return "Tanh"  # the library's default
    if not isinstance(said, str) or not said.startswith("torch.nn."):
        raise ModelError(
            f"{place}: its activation {said!r} is none of torch.nn, and code of its own is not run"
        )
    return said.rpartition(".")[2]


def _weights_of(place: Path) -> Path | None:
    paths: Sequence[Path] = [place / name for name in WEIGHTS]
    return next((path for path in paths if path.is_file()), None)


def write_modules(folder: Path, pooling: str, dim: int) -> None:
    """Write sentence-transformers' files into a folder of a transformer: a pooling, then unit norm.

    Args:
        folder: is there.
        pooling: "cls", "mean", or another of our names for what the library knows.
        dim: of a token's state.
    """
    kinds = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"{_LIBRARY}models.{kind}"}
        for place, (kind, path) in enumerate(kinds)
    ]
    (folder / MODULES_FILE).write_text(json.dumps(modules))
    flags = {flag: name == pooling for flag, name in _FLAGS.items()}
    (folder / POOLING_FILE).parent.mkdir(exist_ok=True)
    (folder / POOLING_FILE).write_text(json.dumps({"word_embedding_dimension": dim, **flags}))
