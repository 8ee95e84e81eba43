"""What is done to a trial: drawn from the campaign's seed and the trial's number, before anything runs."""

import random
from dataclasses import dataclass

# How the store fails in between; weights by how often a real one does.
NOISE = {"503": 6, "500": 3, "lost": 3, "mute": 3, "cut": 3, "torn": 2, "slow": 1}
RATES = (0.0, 0.0, 0.01, 0.05, 0.1)

# (method, piece of the path): the requests at which a run changes from one state to the next.
EMBED_STEPS = (
    ("GET", "/corpus/"),
    ("PUT", "/lease.json"),
    ("PUT", "/dataset.json"),
    ("PUT", "/plan/"),
    ("PUT", "/embeddings/"),
    ("PUT", "/rejected/"),
    ("PUT", "/done/"),
    ("PUT", "/manifest.json"),
    ("DELETE", "/done/"),
    ("DELETE", "/embeddings/"),
    ("PUT", "/report.json"),
    ("DELETE", "/lease.json"),
)
INDEX_STEPS = (
    ("GET", "/embeddings/"),
    ("PUT", "/index/trained/"),
    ("PUT", "/index/training.json"),
    ("PUT", ".part"),
    ("PUT", "/sizes"),
    ("PUT", "/piece-"),
    ("PUT", "index.faiss"),
    ("POST", "index.faiss"),
    ("PUT", "/index/index.json"),
    ("DELETE", "/index/"),
    ("DELETE", "/index/lease.json"),
)
REPEATED = ("/corpus/", "/embeddings/", "/done/", ".part")

# Requests and seconds of an undisturbed run; the moments are spread over these.
REQUESTS = {"embed": 160, "index": 150}
SECONDS = {"embed": 14.0, "index": 12.0}

ALONE = {"driver": 5, "sigterm": 2, "encoder": 5, "worker": 4, "store": 3, "raylet": 1}
CLUSTER = {"driver": 4, "sigterm": 2, "encoder": 4, "worker": 3, "store": 3, "node": 6}


@dataclass(frozen=True)
class Moment:
    """When: at a request by number, at the n-th request of a kind, or so many seconds after the start."""

    request: int | None = None
    step: tuple[str, str] | None = None
    occurrence: int = 1
    answered: bool = False
    seconds: float | None = None

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"{self.seconds:.1f} s"
        if self.request is not None:
            return f"request {self.request}"
        side = "after" if self.answered else "before"
        return f"{side} {' '.join(self.step)} no. {self.occurrence}"


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
class Trial:
    """All that is done in one trial; ``change`` is made to the corpus after the first life."""

    number: int
    seed: str
    cluster: bool
    encoders: int
    lives: tuple[Life, ...]
    change: str | None
    further_run: bool


def draw(seed: int, number: int) -> Trial:
    """Draw a trial; the same seed and number give the same trial."""
    name = f"{seed}-{number}"
    rng = random.Random(name)
    cluster = rng.random() < 0.6
    encoders = rng.choice((1, 1, 2))
    lives = [_life(rng, "embed", cluster) for _ in range(rng.choice((1, 1, 1, 1, 2)))]
    change = rng.choice(("changed", "new", "removed")) if rng.random() < 0.35 else None
    if change:
        lives.append(_life(rng, "embed", cluster))
    if rng.random() < 0.35:
        lives.append(_life(rng, "index", cluster))
    return Trial(number, name, cluster, encoders, tuple(lives), change, rng.random() < 0.25)


def _life(rng: random.Random, job: str, cluster: bool) -> Life:
    kinds = CLUSTER if cluster else ALONE
    blows = []
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        when = _moment(rng, job)
        if when.step is not None and rng.random() < 0.4:
            blows.append(Blow("requester", when))
        else:
            blows.append(Blow(rng.choices(list(kinds), list(kinds.values()))[0], when))
    return Life(job, rng.choice(RATES), tuple(blows))


def _moment(rng: random.Random, job: str) -> Moment:
    kind = rng.random()
    if kind < 0.35:
        return Moment(request=rng.randint(1, REQUESTS[job]))
    if kind < 0.6:
        return Moment(seconds=rng.uniform(0.0, SECONDS[job]))
    step = rng.choice(EMBED_STEPS if job == "embed" else INDEX_STEPS)
    occurrence = rng.randint(1, 10) if step[1] in REPEATED else 1
    return Moment(step=step, occurrence=occurrence, answered=rng.random() < 0.5)
