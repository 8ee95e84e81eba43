"""What is done in a trial: drawn from the campaign's seed and the trial's number, before anything runs."""

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.campaign.corpus import CHANGES
from tests.campaign.foreign import Foreign, draw_foreign
from tests.campaign.jobs import Asked, Reuse
from tests.campaign.moments import EMBED, INDEX, RERANK, SEARCH, Moment, draw_moment

# How the store fails in between; weights by how often a real one does.
NOISE = {"503": 6, "500": 3, "lost": 3, "mute": 3, "cut": 3, "torn": 2, "slow": 1}
RATES = (0.0, 0.0, 0.01, 0.05, 0.1)

ALONE = {"driver": 5, "sigterm": 2, "worker": 4, "store": 3, "raylet": 1}
CLUSTER = {"driver": 4, "sigterm": 2, "worker": 3, "store": 3, "node": 6}
# Actors that a job has beside its workers.
ACTORS = {
    EMBED: {"model": 5},
    INDEX: {"searcher": 3},
    SEARCH: {"model": 3, "searcher": 3},
    RERANK: {"model": 5},
}


@dataclass(frozen=True)
class Blow:
    """One thing done to a run; "requester" is the process that made the request of the moment."""

    what: str
    when: Moment


@dataclass(frozen=True)
class Life:
    """One run of a job, and what is done to it."""

    job: str
    noise: float
    blows: tuple[Blow, ...]


@dataclass(frozen=True)
class Leg:
    """A search or rerank asked one way: its lives, after which it is run calmly to its end and checked."""

    asked: Asked
    lives: tuple[Life, ...]


@dataclass(frozen=True)
class Trial:
    """All that is done in one trial.

    ``change`` is made to the corpus before the last life of embed; then come the index, if there are lives
    of it, and the legs. ``chunked``: texts are cut; ``reuse``: where embed looks for texts that it has.
    """

    number: int
    seed: str
    cluster: bool
    encoders: int
    grace_s: int
    embeds: tuple[Life, ...]
    change: str | None
    indexes: tuple[Life, ...]
    legs: tuple[Leg, ...]
    foreign: tuple[Foreign, ...]
    further_run: bool
    chunked: bool
    reuse: Reuse

    def lives(self) -> Iterator[Life]:
        """Yield all lives, in their order."""
        yield from self.embeds
        yield from self.indexes
        for leg in self.legs:
            yield from leg.lives

    def jobs(self) -> list[str]:
        """Return what each life is of, as the summary counts it."""
        legs = [leg.asked.title for leg in self.legs for _ in leg.lives]
        return [*(life.job for life in (*self.embeds, *self.indexes)), *legs]


def draw(seed: int, number: int) -> Trial:
    """Draw a trial; the same seed and number give the same trial."""
    name = f"{seed}-{number}"
    rng = random.Random(name)
    cluster = rng.random() < 0.6
    change = rng.choice(CHANGES) if rng.random() < 0.6 else None
    # Where runs are what the trial is about, the data set below them has few lives.
    runs = rng.random() < 0.6
    embeds = rng.choice((1, 1, 2)) + (change is not None and not runs)
    indexed = rng.random() < (0.5 if runs else 0.35)
    legs = tuple(_legs(rng, cluster, indexed=indexed)) if runs else ()
    jobs = {EMBED, *([INDEX] if indexed else []), *(leg.asked.job for leg in legs)}
    jobs |= {RERANK for leg in legs if leg.asked.reranks}
    outside = any(leg.asked.outside for leg in legs)
    return Trial(
        number=number,
        seed=name,
        cluster=cluster,
        encoders=rng.choice((1, 1, 2)),
        grace_s=rng.choice((0, 0, 0, 5)),
        embeds=tuple(_life(rng, EMBED, cluster) for _ in range(embeds)),
        change=change,
        indexes=(_life(rng, INDEX, cluster),) if indexed else (),
        legs=legs,
        foreign=draw_foreign(rng, jobs, outside=outside),
        further_run=rng.random() < 0.25,
        chunked=rng.random() < 0.6,
        reuse="corpus" if rng.random() < 0.3 else "object",
    )


def _legs(rng: random.Random, cluster: bool, *, indexed: bool) -> Iterator[Leg]:
    """Yield one search, or the same with another setting after it, and maybe a rerank of what it found."""
    reranks = rng.random() < 0.4
    first = Asked(
        SEARCH, exact=not indexed, reranks=reranks, outside=rng.random() < 0.5 if reranks else False
    )
    searches = [first, *([_otherwise(rng, first)] if rng.random() < 0.6 else [])]
    yield from (_leg(rng, asked, cluster) for asked in searches)
    if reranks or rng.random() < 0.4:
        return
    found = searches[-1]
    over = Asked(RERANK, exact=found.exact, k=found.k, outside=rng.random() < 0.5, over=found)
    yield _leg(rng, over, cluster)
    if rng.random() < 0.5:
        yield _leg(rng, _otherwise(rng, over), cluster)


def _otherwise(rng: random.Random, asked: Asked) -> Asked:
    """Return the same with one setting changed: a run of its own, in the same folders."""
    changes: list[dict[str, object]] = [{"tag": "other"}, {"max_length": 24}]
    if asked.job == SEARCH:
        changes.append({"k": asked.k + 5})
    if asked.job == RERANK or asked.reranks:
        changes.append({"depth": asked.depth + 2})
    return dataclasses.replace(asked, **rng.choice(changes))


def _leg(rng: random.Random, asked: Asked, cluster: bool) -> Leg:
    lives = rng.choice((1, 1, 1, 2))
    return Leg(asked, tuple(_life(rng, asked.job, cluster) for _ in range(lives)))


def _life(rng: random.Random, job: str, cluster: bool) -> Life:
    kinds = (CLUSTER if cluster else ALONE) | ACTORS[job]
    blows = []
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        when = draw_moment(rng, job)
        if when.step is not None and rng.random() < 0.4:
            blows.append(Blow("requester", when))
        else:
            blows.append(Blow(rng.choices(list(kinds), list(kinds.values()))[0], when))
    return Life(job, rng.choice(RATES), tuple(blows))
