"""Training examples as a table, and which of them, with which of their passages, make each step.

Order and draws are functions of the seed, the epoch and the example, without a state: a training that is
taken up in its middle goes on as if nothing had been. No torch here.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from bge_ray.records.ids import IdArray

SCHEMA = pa.schema(
    [
        ("query", pa.large_string()),
        ("prompt", pa.large_string()),
        ("positives", pa.list_(pa.large_string())),
        ("negatives", pa.list_(pa.large_string())),
        ("positive_scores", pa.list_(pa.float32())),
        ("negative_scores", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class Schedule:
    """Which examples a step has: every epoch all of them in another order, but for a rest below a step."""

    examples: int
    batch_queries: int
    steps: int
    seed: int

    @property
    def steps_an_epoch(self) -> int:
        """Steps in which all examples come once."""
        return self.examples // self.batch_queries

    @property
    def positions(self) -> int:
        """Examples of all steps together."""
        return self.steps * self.batch_queries

    def order(self, epoch: int) -> IdArray:
        """Return the (examples,) order of an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.examples)

    def epoch_of(self, position: int) -> tuple[int, int]:
        """Return the epoch of the example at a position among all, and its place in the epoch's order."""
        epoch, step = divmod(position // self.batch_queries, self.steps_an_epoch)
        return epoch, step * self.batch_queries + position % self.batch_queries


@dataclass(frozen=True)
class Group:
    """A query and its passages, the positive first, each with its teacher's score if there is one."""

    query: str
    prompt: str | None
    passages: list[str]
    scores: list[float] | None


@dataclass(frozen=True)
class HeldOutQuery:
    """A query whose ``positives`` are to be found; ``prompt`` replaces the instruction if there is one."""

    query_id: str
    query: str
    prompt: str | None
    positives: list[str]
    negatives: list[str]


def draw(table: pa.Table, row: int, epoch: int, size: int, seed: int) -> Group:
    """Return the group of an example in an epoch: one positive, and size - 1 negatives, over again if few.

    Args:
        table: of `SCHEMA`; the example has a negative if ``size`` is above 1.
        row: of the example.
        epoch: counted from 0.
        size: of the group.
        seed: of all draws.
    """
    example = {name: table.column(name)[row].as_py() for name in SCHEMA.names}
    random = np.random.default_rng([seed, epoch, row])
    positive = int(random.integers(len(example["positives"])))
    chosen: list[int] = []
    while len(chosen) < size - 1:
        chosen += random.permutation(len(example["negatives"])).tolist()
    chosen = chosen[: size - 1]
    scores = None
    if example["positive_scores"] is not None and (size == 1 or example["negative_scores"] is not None):
        scores = [example["positive_scores"][positive]]
        scores += [example["negative_scores"][negative] for negative in chosen]
    passages = [example["positives"][positive], *(example["negatives"][negative] for negative in chosen)]
    return Group(example["query"], example["prompt"], passages, scores)
