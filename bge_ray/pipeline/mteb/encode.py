"""Texts to vectors for mteb: actors that hold one model while tasks ask, and the encoder that mteb sees."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from mteb.models.abs_encoder import AbsEncoder
from ray.actor import ActorHandle

from bge_ray.errors import ModelError
from bge_ray.model.spec import model_folder, text_feeder
from bge_ray.model.uncollected import uncollected
from bge_ray.pipeline.engine.device import device_or_exit
from bge_ray.pipeline.engine.pools import Pool, cluster_sizes, encoder_request
from bge_ray.pipeline.engine.tasks import wait_for
from bge_ray.pipeline.mteb.rules import Rules, Side
from bge_ray.records.ids import FloatArray
from bge_ray.records.model import EMBEDDING, ModelSpec
from bge_ray.settings.sections import Auto, Settings

logger = logging.getLogger(__name__)

MAX_RESTARTS = 20
# Texts of one call of an actor: enough for batches of like lengths, and few enough to share them out.
TEXTS_AT_ONCE = 512
MOST_ENCODERS = 1_000_000


class TextEncoder:
    """An actor that holds a model and encodes texts as they are asked for."""

    def __init__(
        self, spec: ModelSpec, device: str, threads: int, budget: int | Auto, trust_remote_code: bool
    ) -> None:
        """Load the model."""
        self._spec, self._trust = spec, trust_remote_code
        self._device = device
        self._feeders: dict[tuple[str, bool], Any] = {}
        self._load(threads, budget)

    @uncollected()
    def _load(self, threads: int, budget: int | Auto) -> None:
        from bge_ray.model.run.model import Model, Place

        place = Place(self._device, threads, self._trust)
        self._model = Model(self._spec, model_folder(self._spec), place)
        self._budget = self._model.settle_budget(budget)

    def encode(self, texts: Sequence[str], instruction: str, *, are_queries: bool) -> FloatArray:
        """Return (n, dim) float32 vectors of n texts behind an instruction.

        Raises:
            ModelError: a text has no vector.
        """
        key = (instruction, are_queries)
        if key not in self._feeders:
            spec = dataclasses.replace(
                self._spec,
                query_instruction=instruction if are_queries else "",
                passage_instruction="" if are_queries else instruction,
            )
            self._feeders[key] = text_feeder(spec, trust_remote_code=self._trust)
        feeder = self._feeders[key]
        tokens = feeder.queries(texts) if are_queries else feeder.passages(texts)
        result = self._model.empty_result(len(texts))
        with device_or_exit("mteb"):
            self._model.run(tokens, self._model.cut(tokens, self._budget), result)
        for row, (reason, detail) in sorted(result.faults.items()):
            raise ModelError(f"{self._spec.name}: {texts[row][:60]!r} has no vector: {reason}, {detail}")
        found: FloatArray = result.array(EMBEDDING)
        return found


class Encoders:
    """Actors that hold one model, started at the first text and ended by `stop`."""

    def __init__(self, settings: Settings, spec: ModelSpec, watch: Callable[[], None]) -> None:
        """Note which model.

        Args:
            settings: how many actors, and what each takes.
            spec: of the model; its vectors are given as float32.
            watch: called while texts are encoded; raises to stop.
        """
        self._settings, self._watch = settings, watch
        self._spec = spec.only(EMBEDDING).stored_as("float32")
        self._actors: list[ActorHandle] = []

    def encode(self, texts: Sequence[str], instruction: str, *, are_queries: bool) -> FloatArray:
        """Return (n, dim) float32 vectors of n texts, in their order.

        Raises:
            ModelError: a text has no vector, or the model is not to be had.
            IncompleteRunError: the actors died again and again.
        """
        if not len(texts):
            return np.zeros((0, self._spec.dim), dtype=np.float32)
        actors = self._started()
        order = np.argsort([len(text) for text in texts], kind="stable")
        pieces = [order[start : start + TEXTS_AT_ONCE] for start in range(0, len(order), TEXTS_AT_ONCE)]
        calls = [
            actors[number % len(actors)].encode.remote(
                [texts[i] for i in piece], instruction, are_queries=are_queries
            )
            for number, piece in enumerate(pieces)
        ]
        vectors = np.empty((len(texts), self._spec.dim), dtype=np.float32)
        for piece, found in zip(pieces, wait_for(calls, self._watch), strict=True):
            vectors[piece] = found
        return vectors

    def _started(self) -> list[ActorHandle]:
        if not self._actors:
            settings = self._settings
            sizes = cluster_sizes(settings, [encoder_request(settings, MOST_ENCODERS)], [], self._watch)
            self._actors = _start(settings, self._spec, sizes.pools["encoders"])
        return self._actors

    def stop(self) -> None:
        """End the actors, whose CPUs and GPUs a job may need."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


def _start(settings: Settings, spec: ModelSpec, pool: Pool) -> list[ActorHandle]:
    actor = ray.remote(
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        max_restarts=MAX_RESTARTS,
        max_task_retries=MAX_RESTARTS,
    )(TextEncoder)
    logger.info("%s: encoders %s", spec.name, pool)
    budget, trust = settings.batching.token_budget, settings.model.trust_remote_code
    return [actor.remote(spec, pool.device, pool.threads, budget, trust) for _ in range(pool.count)]


class JobEncoder(AbsEncoder):  # type: ignore[misc]
    """What mteb takes for an encoder: its texts go to the actors, with the instruction that the rules say."""

    def __init__(self, meta: Any, encoders: Encoders, rules: Rules) -> None:
        """Take the actors.

        Args:
            meta: of the model, as mteb has it.
            encoders: that hold it.
            rules: what stands before which text.
        """
        self.model = None
        self.mteb_model_meta = meta
        self._encoders, self._rules = encoders, rules

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,  # noqa: ARG002 - as mteb calls it
        hf_subset: str,  # noqa: ARG002
        prompt_type: Any = None,
        **_: Any,
    ) -> npt.NDArray[np.float32]:
        """Return (n, dim) float32 vectors of the n texts of a loader of batches."""
        texts = [text for batch in inputs for text in batch["text"]]
        side: Side = None if prompt_type is None else prompt_type.value
        instruction = self._rules.instruction(task_metadata, side)
        return self._encoders.encode(texts, instruction, are_queries=side == "query")
