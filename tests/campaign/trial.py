"""One trial from a clean store to its line: its course, and what came of it."""

import time
import traceback
from pathlib import Path
from typing import Any

from tests.campaign.checks.findings import Findings
from tests.campaign.course import Course, HungError, StoppedError
from tests.campaign.jobs import Models
from tests.campaign.references import References
from tests.campaign.schedule import Trial
from tests.campaign.site import Site


def run_trial(site: Site, trial: Trial, models: Models, references: References, log: Path) -> dict[str, Any]:
    """Run a trial; returns its line for trials.jsonl."""
    started = time.monotonic()
    log.unlink(missing_ok=True)
    course = Course(site, trial, models, log)
    try:
        site.remove(course.root)
        site.set_corpus("base")
        findings = course.follow(references)
    except HungError as error:
        findings = Findings([str(error)])
    except StoppedError:
        raise
    except Exception as error:  # noqa: BLE001 - a trial that cannot be judged is told, the others go on
        findings = Findings([f"the trial itself failed: {error!r}"])
        with log.open("a") as file:
            traceback.print_exc(file=file)
    finally:
        site.kill(course.mark)
        site.proxy.requests.clear()
    site.remove(course.root)
    told, laid = course.told, course.laid
    return {
        "trial": trial.number,
        "seed": trial.seed,
        "cluster": trial.cluster,
        "jobs": trial.jobs(),
        "change": trial.change,
        "chunked": trial.chunked,
        "reuse": trial.reuse,
        "grace_s": trial.grace_s,
        "blows": told.blows,
        "noise": dict(told.noise),
        "runs": len(told.codes),
        "exit_codes": told.codes,
        "foreign": {"laid": laid.count, "touched": sorted(laid.touched), "refused": told.refused},
        "reports": told.reports,
        "run_files": {"compared": told.runs_compared, "same_bytes": told.same_bytes},
        "rows": findings.rows,
        "lost": findings.lost,
        "doubled": findings.doubled,
        "outcome": "; ".join(findings.broken) or "ok",
        "seconds": round(time.monotonic() - started, 1),
    }
