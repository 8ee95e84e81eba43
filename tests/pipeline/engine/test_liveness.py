"""A cluster whose processes stop answering is missed, and one that answers is not."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from bge_ray.errors import IncompleteRunError
from bge_ray.pipeline.engine import liveness
from bge_ray.pipeline.engine.liveness import (
    check_cluster,
    cluster_gone,
    tcp_door,
    unwatch_cluster,
    watch_cluster,
)
from tests.support.runs import wait_until


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(liveness, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(liveness, "LOST_AFTER_S", 0.4)
    yield
    unwatch_cluster()


def test_what_answers_is_there_until_it_does_not() -> None:
    made = socket.create_server(("127.0.0.1", 0))
    door = tcp_door(f"127.0.0.1:{made.getsockname()[1]}")
    accepting = threading.Thread(target=accept_all, args=(made,), daemon=True)
    accepting.start()
    check_cluster()  # none was joined
    watch_cluster({"head": door})
    time.sleep(1)
    check_cluster()
    made.shutdown(socket.SHUT_RDWR)
    made.close()
    began = time.monotonic()
    wait_until(lambda: cluster_gone() is not None, 10)
    assert time.monotonic() - began > 0.3
    with pytest.raises(IncompleteRunError, match="the Ray cluster is gone: its head has not answered"):
        check_cluster()
    unwatch_cluster()
    check_cluster()


def accept_all(made: socket.socket) -> None:
    try:
        while True:
            made.accept()[0].close()
    except OSError:
        return
