"""What there is to do: corpus objects under their numbers, in spans to read and units to commit."""

from collections import Counter
from dataclasses import dataclass

from bge_ray.records.canonical import digest


@dataclass(frozen=True, order=True)
class Unit:
    """A fixed range of rows of one corpus object: what is committed, retried and resumed."""

    object_no: int
    first_row: int
    n_rows: int

    @property
    def name(self) -> str:
        """File stem of everything that belongs to the unit; sorts by place."""
        return f"{self.object_no:08d}-{self.first_row:010d}"


# The version of an object of which its store tells none.
NO_VERSION = "-"
# A token has at least so many bytes of text, in nearly every text: about 4.5 in English, 3 in code.
BYTES_PER_TOKEN = 3


@dataclass(frozen=True)
class UnitLimits:
    """When a unit is full: by rows, or by bytes of text and of what comes of it.

    That is ``vector_bytes`` a row, and ``token_bytes`` for each token that a text may have, of which the
    model reads ``max_tokens``. Where ``share_bytes`` is set, an object is cut into about one unit for that
    many of its stored bytes, so that every encoder gets several, but into none of fewer than ``min_rows``.
    """

    max_rows: int
    max_bytes: int
    vector_bytes: int
    share_bytes: int | None = None
    min_rows: int = 1
    token_bytes: int = 0
    max_tokens: int = 0

    def bytes_of(self, n_rows: int, text_bytes: int) -> int:
        """Return about how many bytes some rows come to, uncompressed."""
        n_tokens = min(text_bytes // BYTES_PER_TOKEN + 2 * n_rows, n_rows * self.max_tokens)
        return text_bytes + n_rows * self.vector_bytes + n_tokens * self.token_bytes


@dataclass(frozen=True)
class Span:
    """The smallest piece of an object that can be read on its own, and the units in it.

    ``start`` and ``stop`` are row groups for Parquet and bytes for plain lines; a format that can
    only be streamed from its beginning has one span over the whole object.
    """

    start: int
    stop: int
    first_row: int
    unit_rows: tuple[int, ...]


@dataclass(frozen=True)
class Coding:
    """How the bytes of an object become records: the same bytes in another coding are other rows.

    ``format`` is parquet, jsonl or csv, and ``compression`` "", gzip or zstd. Of csv alone, ``quoting`` is
    csv, none or auto, and ``header`` names the columns of an object whose first line does not.
    """

    format: str
    compression: str = ""
    quoting: str = "auto"
    header: tuple[str, ...] = ()


@dataclass(frozen=True)
class CorpusObject:
    """One input file under its number; ``etag`` is the version that the store tells of its content.

    Small objects of one ``group`` (the number of its first) are read and encoded together and committed each
    on its own; None is an object by itself. A group is settled when its objects are planned, because which
    texts share a batch decides the last bits of their vectors. ``partitions`` are the kept columns that its
    path and not its rows have, with their one value. ``earlier`` are numbers of objects, of this plan or
    gone, whose texts it may have: where vectors to reuse are looked for.
    """

    object_no: int
    uri: str
    size: int
    etag: str
    coding: Coding
    spans: tuple[Span, ...]
    group: int | None = None
    partitions: tuple[tuple[str, str | None], ...] = ()
    earlier: tuple[int, ...] = ()

    @property
    def n_rows(self) -> int:
        """Rows of the object."""
        return sum(sum(span.unit_rows) for span in self.spans)

    def units(self) -> list[Unit]:
        """All units, in row order."""
        return [unit for span in self.spans for unit in span_units(self.object_no, span)]


@dataclass(frozen=True)
class Plan:
    """The corpus of one run: every object with its number. ``next_object_no`` is never given twice.

    ``corpus`` is the file, folder or glob that was listed, the same from every working folder.
    """

    objects: tuple[CorpusObject, ...]
    next_object_no: int
    corpus: str = ""

    def units(self) -> list[Unit]:
        """All units of all objects, in order of their names."""
        return [unit for corpus_object in self.objects for unit in corpus_object.units()]


@dataclass(frozen=True)
class Removal:
    """What the plan before had and this one leaves out: objects gone from the corpus, by URI, and their rows.

    An object that is there with another content is replaced and not removed, and one of which the same
    version is there under a new name is moved.
    """

    uris: tuple[str, ...] = ()
    rows: int = 0
    rows_before: int = 0

    def __bool__(self) -> bool:
        return bool(self.uris)

    def __str__(self) -> str:
        """Say what goes."""
        share = self.rows / self.rows_before if self.rows_before else 0.0
        n = len(self.uris)
        objects = f"{n:,} {'object' if n == 1 else 'objects'}"
        return f"{objects} with {self.rows:,} rows ({share:.0%}), such as {self.uris[0]}"


def find_removal(previous: Plan | None, plan: Plan) -> Removal:
    """Return what a plan leaves out that the one before had."""
    if previous is None:
        return Removal()
    there = {corpus_object.uri for corpus_object in plan.objects}
    before = {corpus_object.uri for corpus_object in previous.objects}
    # One that is new stands for one that is gone: many may have a size and a time in common.
    new = Counter((o.size, o.etag) for o in plan.objects if o.uri not in before and o.etag != NO_VERSION)
    gone = []
    for known in previous.objects:
        if known.uri not in there:
            if new[known.size, known.etag]:
                new[known.size, known.etag] -= 1
            else:
                gone.append(known)
    rows_before = sum(corpus_object.n_rows for corpus_object in previous.objects)
    return Removal(tuple(o.uri for o in gone), sum(o.n_rows for o in gone), rows_before)


def span_units(object_no: int, span: Span) -> list[Unit]:
    """Return the units of one span, in row order."""
    units, first = [], span.first_row
    for n_rows in span.unit_rows:
        units.append(Unit(object_no, first, n_rows))
        first += n_rows
    return units


def unit_fingerprint(rows_fingerprint: str, corpus_object: CorpusObject, unit: Unit) -> str:
    """Return the hex sha256 of all that decides what a unit's files hold.

    Args:
        rows_fingerprint: of the data set, see `DatasetSpec.rows_fingerprint`.
        corpus_object: which version of which object.
        unit: which rows of it.
    """
    version = [corpus_object.uri, corpus_object.size, corpus_object.etag]
    return digest([rows_fingerprint, *version, unit.object_no, unit.first_row, unit.n_rows])
