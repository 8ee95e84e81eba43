"""A migration as a page of Markdown: both data sets side by side, then what evaluate says of the answers."""

from bge_ray.records.migration import Migration, Side
from bge_ray.report.words import duration


def migration_page(found: Migration, compared: str | None) -> str:
    """Return the page.

    Args:
        found: both data sets.
        compared: what evaluate says of the two runs, as Markdown; None where there is one data set only.
    """
    sides = [side for side in (found.old, found.new) if side is not None]
    names = ["new"] if found.old is None else ["old", "new"]
    rows = [
        ("data set", [side.dataset for side in sides]),
        ("model", [side.model for side in sides]),
        ("numbers a vector", [f"{side.dim:,}" for side in sides]),
        ("vectors", [f"{side.vectors:,}" for side in sides]),
        ("index", [_index(side) for side in sides]),
        ("last embed run", [_run(side) for side in sides]),
    ]
    lines = [
        f"# {found.pointer} leads to {found.leads_to or 'nothing yet'}",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
        *(
            f"| {what} | " + " | ".join(told.replace("|", "\\|") for told in cells) + " |"
            for what, cells in rows
        ),
        "",
    ]
    if compared is None:
        return "\n".join([*lines, "There was no data set to compare with.", ""])
    return "\n".join([*lines, compared])


def _index(side: Side) -> str:
    return "none: exact" if side.index is None else f"{side.index}, recall {side.recall:.4f}"


def _run(side: Side) -> str:
    if side.embed_s is None:
        return "no report"
    cost = "" if side.embed_cost is None else f", for {side.embed_cost:.2f}"
    return f"{side.embed_tokens:,} tokens encoded in {duration(side.embed_s)}{cost}"
