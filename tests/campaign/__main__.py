"""The fault campaign: random kills and errors at random moments, and the guarantees checked after each trial.

    python -m tests.campaign --trials 200 --seed 1 --parallel 2 --out campaign-out

A campaign that was broken off goes on where it was. Exit code 1: a guarantee broke; ``--only N`` repeats
trial N alone.
"""

import argparse
import json
import os
import queue
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from tests.campaign.corpus import CHANGES, corpus, queries
from tests.campaign.jobs import Models
from tests.campaign.references import References
from tests.campaign.schedule import draw
from tests.campaign.site import Site
from tests.campaign.summary import as_markdown, summarise
from tests.campaign.trial import run_trial
from tests.support.models import make_cross_encoder, make_encoder
from tests.support.warm import COLD, warm_environment


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=200, help="how many trials, from number 0 on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="trials at once")
    parser.add_argument("--out", type=Path, default=Path("campaign-out"), help="folder of results and logs")
    parser.add_argument(
        "--cold", action="store_true", help="start every worker as Ray does: takes thrice as long"
    )
    parser.add_argument("--only", type=int, metavar="N", help="run trial N alone, and write no results")
    arguments = parser.parse_args(argv)
    if arguments.cold:
        os.environ[COLD] = "1"
    out = arguments.out.resolve()
    results = out / "trials.jsonl"
    lines = _read(results)
    if any(line["seed"] != draw(arguments.seed, line["trial"]).seed for line in lines):
        parser.error(f"{results} is of another seed; choose another --out")
    numbers = [n for n in range(arguments.trials) if n not in {line["trial"] for line in lines}]
    if arguments.only is not None:
        numbers = [arguments.only]
    with closing(_run(numbers, arguments.seed, arguments.parallel, out)) as ran:
        for line in ran:
            print(json.dumps(line), flush=True)
            lines.append(line)
            if arguments.only is None:
                with results.open("a") as file:
                    print(json.dumps(line), file=file)
    if arguments.only is not None:
        print(f"log: {out / 'logs' / str(arguments.only)}")
        return int(lines[-1]["outcome"] != "ok")
    summary = {"seed": arguments.seed, **summarise(lines)}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (out / "summary.md").write_text(as_markdown(summary) + "\n")
    print(as_markdown(summary))
    return int(bool(summary["broken"]))


def _run(numbers: list[int], seed: int, parallel: int, out: Path) -> Iterator[dict[str, Any]]:
    """Run trials, so many at once, and yield their lines as they end."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    models = Models(out / "models" / "encoder", out / "models" / "reranker")
    if not models.encoder.exists():
        make_encoder(models.encoder)
    if not models.reranker.exists():
        make_cross_encoder(models.reranker)
    for state in ("base", *CHANGES):
        corpus(state)  # here, because Python 3.11 parses source in one thread only
    queries()
    warm_environment()  # here, once for all threads
    references = References(out / "references", models)
    free: queue.SimpleQueue[Site] = queue.SimpleQueue()

    def one(number: int) -> dict[str, Any]:
        site = free.get()
        try:
            return run_trial(site, draw(seed, number), models, references, out / "logs" / str(number))
        finally:
            free.put(site)

    with ExitStack() as stack, ThreadPoolExecutor(max(1, parallel)) as pool:
        sites = [stack.enter_context(Site(out / f"site-{n}")) for n in range(min(parallel, len(numbers)))]
        for site in sites:
            free.put(site)
        try:
            for ended in as_completed([pool.submit(one, number) for number in numbers]):
                yield ended.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for site in sites:
                site.stop()


def _read(results: Path) -> list[dict[str, Any]]:
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left running
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
