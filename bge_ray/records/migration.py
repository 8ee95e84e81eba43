"""What migration.json holds: the data set in use and the one that may take its place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Side:
    """One of the two data sets; ``index`` is None where vectors are searched exactly.

    ``embed_s``, ``embed_cost`` and ``embed_tokens`` are of its last embed run, by its report; None where
    there is none, the cost also where no price is set.
    """

    dataset: str
    model: str
    dim: int
    vectors: int
    index: str | None
    recall: float | None
    embed_s: float | None
    embed_cost: float | None
    embed_tokens: int | None


@dataclass(frozen=True)
class Migration:
    """Where the pointer leads now (None: nowhere yet), and both data sets.

    ``old`` is None where there was nothing to compare with; ``compared`` is the folder of what evaluate says.
    """

    pointer: str
    leads_to: str | None
    old: Side | None
    new: Side
    compared: str | None
