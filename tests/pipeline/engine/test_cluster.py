"""What a process is prepared with before Ray is imported, by where its cluster will be."""

import importlib
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bge_ray.errors import DamagedShardError
from bge_ray.pipeline.engine.cluster import quiet_ray
from tests.support.runs import REPOSITORY

SCRIPT = """
import json, os, sys
from bge_ray.pipeline.engine.cluster import prepare_environment, restore_environment
from bge_ray.settings.sections import ResourcesSettings
before = dict(os.environ)
prepare_environment(ResourcesSettings(address=json.loads(sys.argv[1])))
assert "ray" not in sys.modules
print(json.dumps({k: v for k, v in os.environ.items() if before.get(k) != v}))
restore_environment(before)
assert dict(os.environ) == before
"""


@pytest.mark.parametrize(
    ("address", "environment", "own"),
    [
        (None, {}, True),
        (None, {"RAY_ADDRESS": ""}, True),
        (None, {"RAY_ADDRESS": "local"}, True),
        ("local", {"RAY_ADDRESS": "head:6379"}, True),
        (None, {"RAY_ADDRESS": "head:6379"}, False),
        ("head:6379", {}, False),  # whose token is not ours to make up
        ("auto", {}, False),
    ],
)
def test_a_cluster_of_its_own_gets_a_token_and_loopback_and_others_are_left_alone(
    address: str | None, environment: dict[str, str], own: bool
) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(address)],
        cwd=REPOSITORY,
        env=plain | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    changed = json.loads(done.stdout)
    assert ("RAY_AUTH_TOKEN" in changed) == own
    assert (changed.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == "0") == own


def test_what_is_quiet_meanwhile_is_as_it_was_afterwards() -> None:
    importlib.import_module("ray.data")  # which sets up its own loggers
    names = ["ray", "ray.data", "ray.data._internal.progress"]
    filtered = [
        logging.getLogger(f"ray.data.{name}")
        for name in (
            "_internal.execution.operators.map_operator",
            "_internal.execution.streaming_executor_state",
            "exceptions",
        )
    ]

    def state() -> tuple[object, ...]:
        return (
            [logging.getLogger(name).level for name in names],
            list(warnings.filters),
            [list(logger.filters) for logger in filtered],
        )

    before = state()
    with pytest.raises(ZeroDivisionError), quiet_ray():
        assert state() != before
        assert logging.getLogger("ray.data").level == logging.WARNING
        logging.getLogger("ray").setLevel(logging.ERROR)  # as ray.init does
        raise ZeroDivisionError
    assert state() == before


def test_the_traceback_of_an_error_of_ours_is_left_out_and_any_other_is_told() -> None:
    importlib.import_module("ray.data")
    logger, told = logging.getLogger("ray.data.exceptions"), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with quiet_ray():
            for error in (DamagedShardError("s3://shard", "is damaged"), ZeroDivisionError("of others")):
                try:
                    raise error
                except type(error):
                    logger.warning("in Ray Data or Ray Core")
                    logger.exception("Full stack trace")
    finally:
        logger.removeHandler(handler)
    assert told == ["in Ray Data or Ray Core", "Full stack trace"]


# As much of Ray as leaving it takes, with the session folder that a local cluster would have.
LEAVING = """
import sys
from pathlib import Path
from types import SimpleNamespace

session, logs = Path(sys.argv[1]), sys.argv[2]
session.joinpath("logs").mkdir(parents=True)
session.joinpath("logs", "raylet.out").write_text("one line")
session.with_name("session_latest").symlink_to(session)
node = SimpleNamespace(
    head=True, all_processes={}, get_session_dir_path=lambda: str(session), kill_all_processes=print
)
sys.modules["ray"] = SimpleNamespace(
    is_initialized=lambda: True,
    shutdown=lambda: None,
    _private=SimpleNamespace(worker=SimpleNamespace(_global_node=node)),
)
from bge_ray.pipeline.engine.cluster import disconnect
disconnect(keep_logs=logs == "kept")
"""


@pytest.mark.parametrize(
    ("logs", "environment", "left"),
    [
        ("kept", {}, ["session_1", "session_latest"]),
        ("not kept", {}, []),
        ("not kept", {"BGE_RAY_KEEP_SESSION": "1"}, ["session_1", "session_latest"]),
    ],
)
def test_the_session_folder_goes_where_its_logs_are_not_wanted(
    tmp_path: Path, logs: str, environment: dict[str, str], left: list[str]
) -> None:
    """Ray itself never removes one; of a run that failed, and where it is asked for, it stays."""
    subprocess.run(
        [sys.executable, "-c", LEAVING, str(tmp_path / "session_1"), logs],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)} | environment,
        check=True,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == left
