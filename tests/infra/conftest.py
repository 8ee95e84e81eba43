"""A Ray head with the Jobs API, started after the S3 server so that its jobs inherit the credentials."""

from collections.abc import Iterator

import pytest

from tests.infra.head import RayHead
from tests.support.s3 import S3Server


@pytest.fixture(scope="module")
def head(s3_server: S3Server) -> Iterator[RayHead]:
    pytest.importorskip("ray.dashboard.modules.job.sdk", reason="needs ray[default], in the extra `dev`")
    started = RayHead()
    yield started
    started.kill()
