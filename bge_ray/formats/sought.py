"""Which columns a scan looks for: a scan need not know of others."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sought:
    """Names of columns; of ``ids`` and ``texts`` the first that is there is taken."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    title: str | None = None
    kept: tuple[str, ...] = ()

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The names, those that stand for each other together."""
        titles = [(self.title,)] if self.title is not None else []
        return [self.ids, self.texts, *titles, *((name,) for name in self.kept)]

    @property
    def texts_of_units(self) -> tuple[str, ...]:
        """Columns whose bytes count for the size of a unit."""
        titles = (self.title,) if self.title is not None else ()
        return (*self.texts, *titles, *self.kept)
