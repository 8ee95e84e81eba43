"""Which outputs of a data set a search goes by, settled before anything is written."""

from dataclasses import dataclass

from bge_ray.errors import SettingsError
from bge_ray.index.fusion import Fusion
from bge_ray.pipeline.runs.source import Source
from bge_ray.pipeline.search.combine import Combining, Rescoring
from bge_ray.records.model import BM25, COLBERT, EMBEDDING, SPARSE, ModelSpec
from bge_ray.settings.sections import FirstStage, SearchSettings

# What each first stage compares.
OUTPUT_OF: dict[FirstStage, str] = {"dense": EMBEDDING, "sparse": SPARSE, "bm25": BM25}


@dataclass(frozen=True)
class Asked:
    """By which outputs candidates are found, how many of each, and what becomes of them.

    ``combining`` is None where what one finder gives is the result.
    """

    found_by: tuple[str, ...]
    candidates: int
    combining: Combining | None

    @property
    def of_queries(self) -> tuple[str, ...]:
        """The outputs that queries need."""
        rescoring = None if self.combining is None else self.combining.rescoring
        again = () if rescoring is None else tuple(output.name for output in rescoring.outputs)
        return tuple(dict.fromkeys((*self.found_by, *again)))

    @property
    def is_dense(self) -> bool:
        """Whether vectors alone are compared, as every search did once."""
        return self.found_by == (EMBEDDING,) and self.combining is None


def settle_asked(asked: SearchSettings, source: Source) -> Asked:
    """Settle what a search goes by.

    Raises:
        SettingsError: the data set lacks an output that is asked for, or a setting has nothing to act on.
    """
    made = tuple(output.name for output in source.spec.model.outputs)
    where = f"output.uri {source.root}"
    if asked.first_stage == "hybrid":
        stages = asked.hybrid or tuple(stage for stage, output in OUTPUT_OF.items() if output in made)
        if len(stages) < 2:
            raise SettingsError(
                f"search.first_stage hybrid: {where} has {', '.join(made)}, of which {len(stages)} can be "
                "searched; embed with several of embedding, sparse and bm25 among model.outputs"
            )
        key = "search.hybrid" if asked.hybrid else "search.first_stage"
    else:
        stages, key = (asked.first_stage,), "search.first_stage"
    for stage in stages:
        _require(made, OUTPUT_OF[stage], f"{key} {stage}", where)
    found_by = tuple(OUTPUT_OF[stage] for stage in stages)
    if asked.sparse == "approximate" and SPARSE not in found_by:
        raise SettingsError(
            f"search.sparse approximate: {where} has no output {SPARSE}, so that {key} {asked.first_stage} "
            f"searches {', '.join(stages)} alone; leave it out"
        )
    for name in asked.rescore_with:
        _require(made, name, f"search.rescore_with {name}", where)
    if EMBEDDING in found_by and not source.spec.model.normalize:
        raise SettingsError(f"{where}: its vectors are not normalised, which a search needs")
    if EMBEDDING not in found_by:
        given = [f"search.{name}" for name in ("nprobe", "rescore", "replicas") if getattr(asked, name)]
        if given:
            raise SettingsError(
                f"{', '.join(given)}: of the index of the vectors, which {key} {', '.join(stages)} does not "
                "search; leave it out"
            )
    candidates = asked.k if asked.candidates is None else asked.candidates
    if EMBEDDING in found_by and asked.rescore and asked.rescore < candidates:
        raise SettingsError(
            f"search.rescore {asked.rescore}: must be 0, or at least search.candidates ({candidates})"
        )
    return Asked(found_by, candidates, _combining(asked, found_by, source.spec.model))


def _combining(asked: SearchSettings, found_by: tuple[str, ...], model: ModelSpec) -> Combining | None:
    fusion = rescoring = None
    if len(found_by) > 1:
        weights = asked.hybrid_weights or (1.0,) * len(found_by)
        fusion = Fusion(asked.fusion, weights, asked.rrf_k)
    if asked.rescore_with:
        weights = asked.rescore_weights or (1.0,) * len(asked.rescore_with)
        rescoring = Rescoring(tuple(model.output(name) for name in asked.rescore_with), weights)
    if fusion is None and rescoring is None:
        return None
    return Combining(found_by, asked.k, fusion, rescoring)


def _require(made: tuple[str, ...], output: str, key: str, where: str) -> None:
    if output in made:
        return
    models = " of bge-m3 or a model tuned from it" if output in (SPARSE, COLBERT) else ""
    raise SettingsError(
        f"{key}: {where} has no output {output}, only {', '.join(made)}: embed with {output} among "
        f"model.outputs{models}, into another output.uri"
    )
