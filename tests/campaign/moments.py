"""When blows fall: the requests at which each job changes from one state to the next, and its usual pace."""

import random
from dataclasses import dataclass

EMBED, INDEX, SEARCH, RERANK = JOBS = ("embed", "index", "search", "rerank")

# (method, piece of the path) of requests. The end of a run is the same for every job.
_START = (("PUT", "/lease.json"), ("PUT", "/_bge_ray.json"))
_REPORT = (("DELETE", "/report.json"), ("PUT", "/report.html"), ("PUT", "/report.json"))
_END = (*_REPORT, ("DELETE", "/lease.json"))
_RUN_FILES = (("PUT", "/run.parquet"), ("PUT", "/run.trec"), ("PUT", "/rejected.parquet"))
# A run of this size has no pieces: those are written from 16 MB on.
_WORK = (
    ("PUT", "/work/groups/"),
    ("PUT", "/work/parts/"),
    ("DELETE", "/work/groups/"),
    ("DELETE", "/work/parts/"),
)
STEPS = {
    EMBED: (
        *_START,
        ("GET", "/corpus/"),
        ("PUT", "/dataset.json"),
        ("PUT", "/plan/"),
        ("PUT", "/embeddings/"),
        ("PUT", "/rejected/"),
        ("PUT", "/done/"),
        ("PUT", "/changes/"),
        ("PUT", "/manifest.json"),
        ("DELETE", "/done/"),
        ("DELETE", "/embeddings/"),
        ("PUT", "/_retired.json"),
        ("PUT", "/README.md"),
        *_END,
    ),
    INDEX: (
        *_START,
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
        *_END,
    ),
    SEARCH: (*_START, ("GET", "/queries/"), ("GET", "/embeddings/"), *_WORK, *_RUN_FILES, *_END),
    RERANK: (*_START, ("GET", "/run.parquet"), ("GET", "/corpus/"), *_WORK, *_RUN_FILES, *_END),
}
REPEATED = ("/corpus/", "/embeddings/", "/done/", ".part", "/work/groups/", "/work/parts/", "/_bge_ray.json")

# Requests and seconds of an undisturbed run; the moments are spread over these.
REQUESTS = {EMBED: 200, INDEX: 180, SEARCH: 300, RERANK: 250}
SECONDS = {EMBED: 14.0, INDEX: 12.0, SEARCH: 14.0, RERANK: 12.0}


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


def draw_moment(rng: random.Random, job: str) -> Moment:
    """Draw a moment of one run of a job."""
    kind = rng.random()
    if kind < 0.3:
        return Moment(request=rng.randint(1, REQUESTS[job]))
    if kind < 0.5:
        return Moment(seconds=rng.uniform(0.0, SECONDS[job]))
    step = rng.choice(STEPS[job])
    occurrence = rng.randint(1, 6) if step[1] in REPEATED else 1
    return Moment(step=step, occurrence=occurrence, answered=rng.random() < 0.5)
