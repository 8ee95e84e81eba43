"""Fixtures shared by all tests: a real S3 server and both kinds of store, small models, one Ray a session."""

import atexit
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import hypothesis
import pytest

from bge_ray.storage.objects import Storage
from tests.support.proxy import Fault, FaultyProxy
from tests.support.s3 import S3Server
from tests.support.warm import warm_workers

# Ray reads these at import; this machine's loopback interface is all the tests may use.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(24),
    # What asks Ray before it was started is a defect, and starts none.
    RAY_ENABLE_AUTO_CONNECT="0",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)
# What a node keeps of models; a run of the tests leaves nothing behind and finds nothing there.
if "BGE_RAY_CACHE" not in os.environ:
    os.environ["BGE_RAY_CACHE"] = tempfile.mkdtemp(prefix="bge-ray-tests-")
    atexit.register(shutil.rmtree, os.environ["BGE_RAY_CACHE"], ignore_errors=True)

# A deadline for one example is a test of how busy the machine is.
hypothesis.settings.register_profile("bge-ray", deadline=None)
hypothesis.settings.load_profile("bge-ray")


# Files of more than about 15 s, which a worker takes whole: begun last, they would be waited for alone.
LONG_FILES = (
    # Of those with a real Ray.
    "test_job.py",
    "test_honest.py",
    "test_work.py",
    "test_m3.py",
    "test_hybrid.py",
    "test_reuse.py",
    "test_api.py",
    "test_last_line.py",
    # Of the others.
    "test_objects.py",
    "test_llm.py",
    "test_workers.py",
    "test_trainer.py",
    "test_out_of_memory.py",
    "test_merge.py",
    "test_encoder_parity.py",
    "test_ownership.py",
    "test_ending.py",
    "test_command.py",
    "test_commit.py",
    "test_corpus.py",
    "test_lease.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; the others, and the tests of each, stay in their order."""
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else 99)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3") / "data")
    server.start()
    os.environ.update(server.environment)
    yield server
    server.kill()


@pytest.fixture
def bucket(s3_server: S3Server, request: pytest.FixtureRequest) -> str:
    """URI of a fresh folder in a bucket."""
    name = re.sub(r"[^A-Za-z0-9_]+", "-", request.node.name)[:60]
    return f"s3://out/{name}-{secrets.token_hex(3)}"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of dim 32 with CLS pooling."""
    from tests.support.models import make_encoder

    return make_encoder(tmp_path_factory.mktemp("models") / "tiny-cls")


@pytest.fixture(scope="session")
def ray_cluster(s3_server: S3Server) -> Iterator[None]:
    """One local Ray for the session, started after S3 so that its workers inherit the credentials."""
    import ray

    with warm_workers():
        try:
            _start_ray()
        except Exception as error:
            # Ray gives its processes 30 s, in which on a new environment all they import is compiled first.
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            _start_ray()
    yield
    ray.shutdown()


def _start_ray() -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=256 << 20,
        _node_ip_address="127.0.0.1",
    )


@pytest.fixture
def storage() -> Storage:
    return Storage(timeout_s=20.0)


@pytest.fixture(params=["file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh folder on this machine, then one in a bucket."""
    return str(tmp_path / "out") if request.param == "file" else request.getfixturevalue("bucket")


@pytest.fixture
def faulty(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Fault], FaultyProxy]]:
    """Puts a proxy between this process and the S3 server."""
    proxies = []

    def start(fault: Fault = lambda *_: "") -> FaultyProxy:
        proxy = FaultyProxy(s3_server.endpoint, fault)
        proxies.append(proxy.__enter__())
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": proxy.url})
        return proxy

    yield start
    for proxy in proxies:
        proxy.__exit__()
