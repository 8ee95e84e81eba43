"""`ray job submit` on a real head behind a token: the README's command, its exit codes, and stopping."""

import json
import logging
import re
import secrets
import sys
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from bge_ray.storage.objects import Storage, join
from tests.infra.head import RayHead
from tests.support.corpora import docstrings, jsonl_bytes, mixed_objects
from tests.support.datasets import check_nothing_left_over, vectors_by_id
from tests.support.runs import REPOSITORY, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STORAGE = Storage(30)
SUBMIT = ("submit", "--working-dir", ".")


def embed_words(root: str, model: Path, *overrides: str) -> list[str]:
    keys = [f"corpus.uri={root}/corpus", f"output.uri={root}/out", f"model.name={model}"]
    keys += ["resources.num_encoders=2", *overrides]
    return ["python", "jobs/embed.py", *(word for key in keys for word in ("--set", key))]


def upload(root: str, objects: dict[str, bytes]) -> None:
    for name, data in objects.items():
        STORAGE.write(join(root, "corpus", name), data)


def job_lines(head: RayHead, submission_id: str) -> list[str]:
    return head.submit("logs", submission_id).stdout.rstrip().splitlines()


def test_the_package_holds_code_and_configs_and_nothing_else(tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    logger = logging.getLogger("packaging")
    create_package(str(REPOSITORY), package, include_gitignore=True, logger=logger)
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
    print(f"shipped: {len(names)} files, {package.stat().st_size / 1e6:.2f} MB")
    assert {name.partition("/")[0] for name in names} == {"bge_ray", "configs", "jobs"}
    assert {"jobs/embed.py", "bge_ray/command.py", "configs/embed.yaml"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]
    assert package.stat().st_size < 2_000_000


@pytest.mark.timeout(600)
def test_a_submitted_job_joins_the_cluster_runs_the_shipped_code_and_succeeds(
    head: RayHead, bucket: str, tiny_model: Path
) -> None:
    records = docstrings(300)
    upload(bucket, mixed_objects(records))
    config = f"{bucket}/embed.yaml"
    sections = {
        "corpus": {"uri": f"{bucket}/corpus"},
        "output": {"uri": f"{bucket}/out"},
        "model": {"name": str(tiny_model)},
    }
    STORAGE.write(config, json.dumps(sections).encode())

    where = head.submit(*SUBMIT, "--", "python", "-c", "import bge_ray; print(bge_ray.__file__)")
    assert re.search(r"/working_dir_files/\S+/bge_ray/__init__.py", where.stdout), where.stdout
    run = head.submit(
        *SUBMIT, "--submission-id", bucket[-6:], "--", "python", "jobs/embed.py", "--config", config
    )

    assert run.returncode == 0, run.stdout + run.stderr
    job = head.job(bucket[-6:])
    assert (job["status"], job["driver_exit_code"]) == ("SUCCEEDED", 0)
    assert vectors_by_id(f"{bucket}/out").keys() == {record["id"] for record in records}
    lines = job_lines(head, bucket[-6:])
    assert lines[-1].endswith(f"INFO embed: done; exit code 0; report at {bucket}/out/report.html")
    assert "Started a local Ray instance" not in run.stdout


@pytest.mark.timeout(600)
def test_the_installed_command_is_submitted_without_a_checkout(
    head: RayHead, bucket: str, tiny_model: Path
) -> None:
    command = Path(sys.executable).with_name("bge-ray")
    if not command.exists():
        pytest.skip("needs the package to be installed: pip install -e .")
    records = docstrings(60)
    upload(bucket, {"x.jsonl": jsonl_bytes(records)})
    submission_id = f"installed-{secrets.token_hex(4)}"
    words = [str(command), "embed", *embed_words(bucket, tiny_model)[2:]]
    run = head.submit("submit", "--submission-id", submission_id, "--", *words)
    assert run.returncode == 0, run.stdout + run.stderr
    last = job_lines(head, submission_id)[-1]
    assert last.endswith(f"INFO embed: done; exit code 0; report at {bucket}/out/report.html")
    assert vectors_by_id(f"{bucket}/out").keys() == {record["id"] for record in records}


@pytest.mark.timeout(600)
def test_exit_codes_come_through(head: RayHead, bucket: str, tiny_model: Path) -> None:
    records = [{"id": str(i), "text": "" if i < 5 else f"passage {i}"} for i in range(10)]
    upload(bucket, {"x.jsonl": jsonl_bytes(records)})
    for code, last, words in [
        (2, "embed: refused, nothing was written; exit code 2", ["--set", "corpus.ury=s3://x"]),
        (2, f"embed: refused; exit code 2; report at {bucket}/out/report.html", []),
    ]:
        submission_id = f"code-{code}-{secrets.token_hex(4)}"
        run = head.submit(
            *SUBMIT, "--submission-id", submission_id, "--", *embed_words(bucket, tiny_model), *words
        )
        assert run.returncode == 1, run.stdout  # the command tells failed from succeeded, no more
        job = head.job(submission_id)
        assert (job["status"], job["driver_exit_code"]) == ("FAILED", code), run.stdout
        assert job_lines(head, submission_id)[-1].endswith(last), run.stdout


@pytest.mark.timeout(600)
def test_stop_leaves_nothing_half_written_and_the_next_submit_goes_on(
    head: RayHead, bucket: str, tiny_model: Path
) -> None:
    records = docstrings(3000)
    upload(bucket, mixed_objects(records, pieces=10))
    words = embed_words(bucket, tiny_model, "batching.unit_rows=25")
    first = f"first-{secrets.token_hex(4)}"
    grace = ("--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}')
    submitted = head.submit(*SUBMIT, *grace, "--no-wait", "--submission-id", first, "--", *words)
    assert submitted.returncode == 0, submitted.stderr
    wait_until(lambda: len(STORAGE.list_files(f"{bucket}/out/done")) > 3)

    assert head.submit("stop", first).returncode == 0

    wait_until(lambda: head.job(first)["status"] == "STOPPED", 90)
    lines = job_lines(head, first)
    last = f"embed: stopped; exit code 143; report at {bucket}/out/report.html"
    assert lines[-1].endswith(last), "\n".join(lines)
    assert STORAGE.read_optional(f"{bucket}/out/lease.json") is None
    assert STORAGE.read_optional(f"{bucket}/out/manifest.json") is None
    done = len(STORAGE.list_files(f"{bucket}/out/done"))
    assert 0 < done < len(records) / 25
    again = head.submit(*SUBMIT, "--", *words)
    assert again.returncode == 0, again.stdout + again.stderr
    report = json.loads(STORAGE.read(f"{bucket}/out/report.json"))
    assert report["units_planned"] == len(records) / 25 - done  # what was there is not done again
    assert len(vectors_by_id(f"{bucket}/out")) == len(records)
    check_nothing_left_over(f"{bucket}/out")


def test_a_wrong_token_is_refused_and_the_message_says_what_to_set(head: RayHead) -> None:
    run = head.submit(*SUBMIT, "--", "python", "jobs/embed.py", "--help", RAY_AUTH_TOKEN="not-the-token")
    assert run.returncode != 0
    assert "Invalid authentication token" in run.stderr
    assert "RAY_AUTH_TOKEN" in run.stderr
