"""Everything that a device tells about this code, in ten minutes: `python -m bge_ray.bench.device --out DIR`.

Each phase runs in a process of its own with its own time; what one finds is on disk at once, so that one that
fails or is killed costs nothing but itself. Written are a JSON file a phase, device.json with all of them,
and report.html.
"""

import dataclasses
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bge_ray.bench.device.page import write_page
from bge_ray.bench.device.plan import Findings, Plan, run_within
from bge_ray.errors import BgeRayError

# Phases in their order, and their shares of the time; names of modules here.
PHASES = {
    "ceilings": 50.0,
    "correctness": 90.0,
    "loop": 200.0,
    "kernels": 30.0,
    "job": 130.0,
    "peers": 60.0,
    "nearest": 25.0,
    "big": 60.0,
}


def main(
    out: Annotated[Path, typer.Option(file_okay=False, help="folder for what is found")],
    minutes: Annotated[float, typer.Option(min=0.1, help="what all phases may take together")] = 10.0,
    phases: Annotated[str, typer.Option(help="which, separated by commas")] = ",".join(PHASES),
    tokenizer: Annotated[Path | None, typer.Option(help="folder with MiniLM's tokenizer files")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; the better one that is here")] = "",
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure this machine's device with this code."""
    if child:
        _run_phase(child, out)
        return
    out.mkdir(parents=True, exist_ok=True)
    chosen = [name.strip() for name in phases.split(",")]
    unknown = sorted(set(chosen) - set(PHASES))
    if unknown:
        raise typer.BadParameter(f"no phase {', '.join(unknown)}; there are {', '.join(PHASES)}")
    second = 60 * minutes / sum(PHASES[name] for name in chosen)
    with tempfile.TemporaryDirectory(prefix="bge-ray-device-") as work:
        for name in chosen:
            plan = Plan(
                device or ("cuda" if torch.cuda.is_available() else "cpu"),
                work,
                str(tokenizer or _packaged_tokenizer() or "") or None,
                time.monotonic() + PHASES[name] * second,
            )
            (out / f"{name}.json").unlink(missing_ok=True)
            started = time.monotonic()
            (out / "plan.json").write_text(json.dumps(dataclasses.asdict(plan)))
            ended = _start_phase(name, out, plan)
            typer.echo(f"{name}: {ended}, {time.monotonic() - started:.0f} s")
            _gather(out, {name: ended})
    write_page(json.loads((out / "device.json").read_text()), out)
    typer.echo((out / "report.md").read_text())


def _start_phase(name: str, out: Path, plan: Plan) -> str:
    command = [sys.executable, "-m", "bge_ray.bench.device", "--out", str(out), "--child", name]
    seconds = plan.ends - time.monotonic()
    code = run_within(command, out / f"{name}.log", seconds)
    if code is None:
        return f"stopped after {seconds:.0f} s"
    if code:
        last = (out / f"{name}.log").read_text().strip().splitlines()[-1:]
        return f"failed with {code}: {' '.join(last)[:300]}"
    return "done"


def _run_phase(name: str, out: Path) -> None:
    plan = Plan(**json.loads((out / "plan.json").read_text()))
    module: Any = importlib.import_module(f"bge_ray.bench.device.{name}")
    module.run(plan, Findings(out / f"{name}.json").note)


def _gather(out: Path, ended: dict[str, str]) -> None:
    """Put what all phases have found, the last time that each ran, into one file."""
    path = out / "device.json"
    before = json.loads(path.read_text())["ended"] if path.is_file() else {}
    known: dict[str, Any] = {"ended": before | ended}
    files = {name: out / f"{name}.json" for name in PHASES}
    known |= {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    path.write_text(json.dumps(known, indent=1))


def _packaged_tokenizer() -> Path | None:
    from bge_ray.bench.models import packaged_minilm

    try:
        return packaged_minilm()
    except BgeRayError:
        return None


if __name__ == "__main__":
    typer.run(main)
