"""The model of a run as it was resolved, encoder or reranker, and the vectors by which it is known again."""

import dataclasses
from dataclasses import dataclass

from bge_ray.records.outputs import Output

# The output of an encoder that is indexed and searched, and that of a reranker.
EMBEDDING = "embedding"
SCORE = "score"


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model that decides its outputs.

    ``family`` names the kind of checkpoint, ``dtype`` what is computed in. Pooling and normalisation say
    nothing where a family has none: a cross-encoder's are ``cls`` and False.
    """

    name: str
    revision: str | None
    weights_sha256: str
    family: str
    outputs: tuple[Output, ...]
    pooling: str
    max_length: int
    normalize: bool
    dtype: str
    query_instruction: str
    passage_instruction: str

    def output(self, name: str) -> Output:
        """Return the output of a name.

        Raises:
            KeyError: the model has none of that name.
        """
        for output in self.outputs:
            if output.name == name:
                return output
        raise KeyError(f"{self.name} has no output {name}, only {[o.name for o in self.outputs]}")

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.output(EMBEDDING).dim

    @property
    def layer_scores(self) -> tuple[str, ...]:
        """The outputs of a reranker beside its score: one a layer, where several layers score."""
        return tuple(o.name for o in self.outputs if o.kind == "scalar" and o.name != SCORE)

    def stored_as(self, dtype: str) -> "ModelSpec":
        """Return the same model with its vectors stored as float16 or float32; scalars stay as they are."""
        outputs = tuple(
            o if o.kind == "scalar" else dataclasses.replace(o, dtype=dtype) for o in self.outputs
        )
        return dataclasses.replace(self, outputs=outputs)


@dataclass(frozen=True)
class Canary:
    """What a model made of a fixed text: ``vector`` (dim,) of a dense output, computed in ``dtype``."""

    text: str
    output: str
    dtype: str
    vector: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class RerankerSpec(ModelSpec):
    """Everything about a reranker that decides its scores.

    ``query_max_length`` tokens are kept of a query. An LLM reranker has a ``prompt``, the question after each
    pair. ``layers``, ascending, score by the heads numbered ``heads``, and the last of them is ``score``;
    there are none where a model has one score. In front of each of ``compress_layers`` every
    ``compress_ratio`` states of the passage become their mean.
    """

    query_max_length: int
    prompt: str = ""
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    compress_ratio: int = 1
    compress_layers: tuple[int, ...] = ()


def as_reranker(spec: ModelSpec) -> RerankerSpec:
    """Return a spec as the reranker's that it is.

    Raises:
        TypeError: it is an encoder's.
    """
    if not isinstance(spec, RerankerSpec):
        raise TypeError(f"{spec.name}: is an encoder, of the family {spec.family}")
    return spec
