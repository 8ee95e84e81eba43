"""The models that have a card, as a table: which run here, what they make, and what memory they take."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bge_ray.model.cards import ModelCard, cards
from bge_ray.model.families import FAMILIES

GPU_BYTES, CPU_BYTES = 2, 4  # of one weight, in half precision and in float32
WIDTH = 190


@dataclass(frozen=True)
class CatalogueRow:
    """One model; ``gpu_bytes`` and ``cpu_bytes`` are those of its weights, None if nobody says how many.

    ``runs`` is ``yes``, or under which condition, or why not.
    """

    id: str
    family: str
    outputs: tuple[str, ...]
    dim: int | None
    max_length: int | None
    languages: tuple[str, ...]
    licence: str | None
    gpu_bytes: int | None
    cpu_bytes: int | None
    runs: str


def catalogue() -> list[CatalogueRow]:
    """Return a row for each card, in their order."""
    return [_row(card) for card in cards().values()]


def print_models(console: Console | None = None) -> None:
    """Print the catalogue as a table.

    Args:
        console: where to; None for standard output.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("model", "family", "outputs"):
        table.add_column(name, no_wrap=name == "model", overflow="fold")
    for name in ("dim", "tokens", "on GPU", "on CPU"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("languages", "licence", "runs"):
        table.add_column(name, overflow="fold")
    for row in catalogue():
        table.add_row(
            row.id,
            row.family,
            ", ".join(row.outputs),
            _number(row.dim),
            _number(row.max_length),
            _gigabytes(row.gpu_bytes),
            _gigabytes(row.cpu_bytes),
            ", ".join(row.languages),
            row.licence or "?",
            row.runs,
        )
    # Of a narrower one rich would leave out columns without a word; a terminal wraps its lines.
    console = console or Console(width=max(WIDTH, Console().width))
    with console.capture() as told:
        console.print(table)
        console.print(
            "Memory is that of the weights alone, in half precision on a GPU and float32 on a CPU. ? is not "
            "known. Other models run from the files of their folder."
        )
    # By the file itself: rich ends the process where a reader has gone.
    console.file.write(told.get())


def _row(card: ModelCard) -> CatalogueRow:
    return CatalogueRow(
        id=card.id,
        family=card.family,
        outputs=card.outputs,
        dim=card.dim,
        max_length=card.max_length,
        languages=card.languages,
        licence=card.licence,
        gpu_bytes=None if card.parameters is None else card.parameters * GPU_BYTES,
        cpu_bytes=None if card.parameters is None else card.parameters * CPU_BYTES,
        runs=_runs(card),
    )


def _runs(card: ModelCard) -> str:
    if card.refused is not None:
        return f"no: {card.refused}"
    if card.family not in {family.NAME for family in FAMILIES}:
        return f"no: this version has no family {card.family}"
    return "with trust_remote_code" if card.needs_remote_code else "yes"


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _gigabytes(value: int | None) -> str:
    return "?" if value is None else f"{value / 1e9:,.2f} GB"
