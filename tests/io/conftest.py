"""Storage on both kinds of store, and a faulty line to the remote one."""

from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from bge_ray.io.storage import Storage
from tests.support.proxy import Fault, FaultyProxy
from tests.support.s3 import S3Server


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
