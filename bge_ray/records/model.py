"""The model of a run as it was resolved, encoder or reranker, and the vectors by which it is known again."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from bge_ray.records.outputs import Output

# The outputs of encoders (the first is what is indexed and searched), and that of a reranker.
EMBEDDING = "embedding"
SPARSE = "sparse"
COLBERT = "colbert"
BM25 = "bm25"
SCORE = "score"


@dataclass(frozen=True)
class Example:
    """A query and its answer, put before every query of a model that learns from examples."""

    instruction: str
    query: str
    response: str


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model that decides its outputs.

    ``family`` names the kind of checkpoint, ``dtype`` what is computed in. Pooling and normalisation say
    nothing where a family has none: a cross-encoder's are ``cls`` and False.

    ``kernels`` is how its layers are computed: ``plain``, by transformers' own, or ``fused``, by fewer
    kernels and with a GELU by tanh (`model.run.fused`).

    ``query_template`` is a query as the model reads it, of ``{instruction}`` and ``{query}``; where it is
    empty, the instruction and then the query. ``examples`` stand before that. Every text begins with
    ``first_token`` and ends with ``last_token``, whatever the tokenizer does by itself; None: as it does.
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
    query_template: str = ""
    examples: tuple[Example, ...] = ()
    first_token: str | None = None
    last_token: str | None = None
    kernels: str = "plain"

    def output(self, name: str) -> Output:
        """Return the output of a name.

        Raises:
            KeyError: the model has none of that name.
        """
        for output in self.outputs:
            if output.name == name:
                return output
        raise KeyError(f"{self.name} has no output {name}, only {[o.name for o in self.outputs]}")

    def around_query(self) -> tuple[str, str]:
        """Return what stands before and behind a query's text, examples aside."""
        if not self.query_template:
            return self.query_instruction, ""
        before, _, behind = self.query_template.partition("{query}")
        # By hand: an instruction may hold braces. Without one, nothing of the template stands before.
        before = before.replace("{instruction}", self.query_instruction) if self.query_instruction else ""
        return before, behind

    def query_key(self) -> list[Any]:
        """Return all that decides what the model reads of a query, beside its text and the tokenizer."""
        examples = [dataclasses.asdict(example) for example in self.examples]
        return [*self.around_query(), examples, self.max_length]

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

    def stored_like(self, other: "ModelSpec") -> "ModelSpec":
        """Return the same model with each output stored as the other's of the same name."""
        dtypes = {o.name: o.dtype for o in other.outputs}
        outputs = tuple(dataclasses.replace(o, dtype=dtypes.get(o.name, o.dtype)) for o in self.outputs)
        return dataclasses.replace(self, outputs=outputs)

    def computed_like(self, other: "ModelSpec") -> "ModelSpec":
        """Return the same model with its layers computed as the other's are."""
        return dataclasses.replace(self, kernels=other.kernels)

    def only(self, *names: str) -> "ModelSpec":
        """Return the same model with some of its outputs, in their order.

        Raises:
            KeyError: it has none of that name.
        """
        wanted = {self.output(name) for name in names}
        return dataclasses.replace(self, outputs=tuple(o for o in self.outputs if o in wanted))

    @property
    def of_states(self) -> "ModelSpec":
        """The same model with the outputs that are made of its states, and not of tokens alone."""
        return dataclasses.replace(self, outputs=tuple(o for o in self.outputs if o.name != BM25))

    @property
    def counts_only(self) -> bool:
        """Whether all that is made of a text is how often it has each token, for which no model is run."""
        return not self.of_states.outputs


@dataclass(frozen=True)
class Canary:
    """What a model made of a fixed text: ``vector`` of an output, computed in ``dtype``.

    It is (dim,) of a dense output and of a multi-vector, of which it is the mean, and as long as
    `model.canary` folds the weights of a sparse one.
    """

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
