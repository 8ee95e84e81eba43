"""The lease: one writer at a time, and a dead one does not stand in the way."""

import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import fsspec
import psutil
import pytest

from bge_ray.errors import OutputBusyError, OutputCollisionError, TakenOverError
from bge_ray.storage.lease import PATIENCE_RENEWALS, Lease, Leases, refuse_foreign_lease
from bge_ray.storage.objects import LOCK_SUFFIX, Storage, join
from bge_ray.storage.ownership import JOURNAL
from tests.support.slow import slow_but

pytestmark = pytest.mark.long

FORKSERVER = multiprocessing.get_context("forkserver")
RENEW_S = 0.15


def holder(storage: Storage, root: str) -> dict:
    return json.loads(storage.read(join(root, "lease.json")))


def leave_behind(storage: Storage, root: str, **changes) -> None:
    """Write the lease of a run that is no more."""
    with Lease(storage, root, RENEW_S):
        content = holder(storage, root) | {"run_id": "another"} | changes
    storage.write(join(root, "lease.json"), json.dumps(content).encode())


def test_a_lease_is_renewed_and_given_back(storage: Storage, root: str) -> None:
    with Lease(storage, root, RENEW_S) as lease:
        first = holder(storage, root)
        assert first["pid"] == os.getpid()
        lease.check()
        time.sleep(2.5 * RENEW_S)
        second = holder(storage, root)
        assert second["beat"] > first["beat"]
        assert not lease.lost.is_set()
    assert storage.read_optional(join(root, "lease.json")) is None
    with Lease(storage, root, RENEW_S):
        pass


def test_a_second_run_is_refused_while_the_first_lives(storage: Storage, root: str) -> None:
    with Lease(storage, root, RENEW_S) as first:
        with (
            pytest.raises(
                OutputBusyError, match=rf"process {os.getpid()}\) is writing this output"
            ) as caught,
            Lease(storage, root, RENEW_S),
        ):
            pass
        assert root in str(caught.value)
        # Which setting named it, a lease does not know: embed's is one of many.
        assert str(caught.value).endswith("wait for its end, stop it, or choose another folder")
        first.check()
    with Lease(storage, root, RENEW_S):
        pass


def _hold(root: str, held) -> None:
    with Lease(Storage(20.0), root, RENEW_S):
        held.set()
        time.sleep(60)


def test_a_killed_holder_on_this_machine_is_followed_at_once(storage: Storage, tmp_path) -> None:
    root = str(tmp_path)
    held = FORKSERVER.Event()
    process = FORKSERVER.Process(target=_hold, args=(root, held))
    process.start()
    assert held.wait(30)
    with pytest.raises(OutputBusyError, match=f"process {process.pid}"), Lease(storage, root, RENEW_S):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    started = time.monotonic()
    with Lease(storage, root, renew_s=30.0) as lease:
        lease.check()
    assert time.monotonic() - started < 5, "patience would have been two minutes"


def test_a_zombie_is_dead(storage: Storage, tmp_path) -> None:
    child = os.posix_spawn("/bin/sleep", ["sleep", "60"], os.environ)
    leave_behind(storage, str(tmp_path), pid=child, process_started=psutil.Process(child).create_time())
    os.kill(child, signal.SIGKILL)
    while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    started = time.monotonic()
    with Lease(storage, str(tmp_path), renew_s=30.0):
        pass
    assert time.monotonic() - started < 5
    os.waitpid(child, 0)


@pytest.mark.parametrize("changes", [{"machine": "another"}, {"host": "far", "machine": "far"}])
def test_a_silent_holder_elsewhere_is_followed_after_patience(storage: Storage, root: str, changes) -> None:
    """Also one of the same host name in another container: its process numbers are not ours."""
    leave_behind(storage, root, pid=999_999, **changes)
    started = time.monotonic()
    with Lease(storage, root, RENEW_S) as lease:
        assert time.monotonic() - started >= PATIENCE_RENEWALS * RENEW_S
        lease.check()
    assert storage.read_optional(join(root, "lease.json")) is None


def test_a_holder_elsewhere_that_gives_back_is_followed(storage: Storage, root: str) -> None:
    leave_behind(storage, root, machine="another")
    threading.Timer(0.2, storage.delete, ([join(root, "lease.json")],)).start()
    started = time.monotonic()
    with Lease(storage, root, renew_s=2.0) as lease:
        lease.check()
    assert time.monotonic() - started < PATIENCE_RENEWALS * 2.0


@pytest.mark.parametrize("kept", [0, 1, 12, 40, -2])
@pytest.mark.parametrize("zeros", [0, 64])
def test_a_lease_of_ours_that_was_cut_is_waited_for_and_replaced(
    storage: Storage, tmp_path, kept: int, zeros: int
) -> None:
    root = str(tmp_path)
    with Lease(storage, root, RENEW_S):
        content = storage.read(join(root, "lease.json"))[:kept] + bytes(zeros)
    storage.write(join(root, JOURNAL), b"of a run that was here")
    storage.write(join(root, "lease.json"), content)
    refuse_foreign_lease(storage, root)
    with Lease(storage, root, RENEW_S) as lease:
        lease.check()
    assert storage.read_optional(join(root, "lease.json")) is None


@pytest.mark.parametrize("claimed", [False, True])
@pytest.mark.parametrize(
    "content", [b'{"hello":"mine"}', b"[]", b"{}", b"null", b"theirs", b'{"run_id": "x"}', b'{\n "b', b""]
)
def test_a_foreign_file_with_the_name_of_the_lease_stays(
    storage: Storage, tmp_path, content: bytes, claimed: bool
) -> None:
    root, uri = str(tmp_path), str(tmp_path / "lease.json")
    if claimed:
        storage.write(join(root, JOURNAL), b"of a run that was here")
        if content in (b"", b'{\n "b'):
            return  # which is ours, cut
    storage.write(uri, content)
    for act in (lambda: refuse_foreign_lease(storage, root), Lease(storage, root, RENEW_S).__enter__):
        with pytest.raises(OutputCollisionError, match="is no lease of this project; move it away") as caught:
            act()
        assert uri in str(caught.value)
        assert caught.value.exit_code == 2
    assert storage.read(uri) == content


def test_the_loser_stops(storage: Storage, root: str) -> None:
    first = Lease(storage, root, RENEW_S)
    with first:
        theirs = holder(storage, root) | {"run_id": "newer"}
        storage.write(join(root, "lease.json"), json.dumps(theirs).encode())
        with pytest.raises(TakenOverError, match="a newer run took this output over"):
            first.check()
        assert first.lost.wait(5 * RENEW_S)
        with pytest.raises(TakenOverError):
            first.check()
        time.sleep(2 * RENEW_S)
    assert holder(storage, root)["run_id"] == "newer", "the loser neither renews nor removes it"


def test_the_loser_finds_out_by_itself(storage: Storage, root: str) -> None:
    with Lease(storage, root, RENEW_S) as lease:
        storage.write(join(root, "lease.json"), b'{"run_id": "newer"}')
        assert lease.lost.wait(8 * RENEW_S)


def _stand_still() -> None:
    # Sent to the process, the signal could be taken by another thread while this one goes on.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


@dataclass(frozen=True)
class Standing(Storage):
    """Its process stops itself after it has looked, and before it replaces or removes what it looked at."""

    verb: str = ""

    def replace(self, uri: str, data: bytes, etag: str) -> bool:
        if self.verb == "replace":
            _stand_still()
        return super().replace(uri, data, etag)

    def delete_seen(self, uri: str, etag: str) -> bool:
        if self.verb == "delete":
            _stand_still()
        return super().delete_seen(uri, etag)


def _hold_until_told(root: str, verb: str, pipe) -> None:
    renew_s = 60.0 if verb == "delete" else RENEW_S
    with Lease(Standing(20.0, verb), root, renew_s) as lease:
        pipe.send("held")
        if verb == "delete":
            return  # stopped while it gives back
        lost = lease.lost.wait(60)
        try:
            lease.check()
            pipe.send((lost, "no error"))
        except TakenOverError as error:
            pipe.send((lost, str(error)))
        time.sleep(3 * RENEW_S)


def _wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 30
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("verb", slow_but(["replace"], ["", "replace", "delete"]))
def test_a_holder_that_stood_still_past_its_patience_touches_nothing(
    storage: Storage, root: str, verb: str, tmp_path: Path
) -> None:
    """Stopped anywhere, or just between its look and its write: its successor's lease stays as it is."""
    ours, theirs = FORKSERVER.Pipe()
    process = FORKSERVER.Process(target=_hold_until_told, args=(root, verb, theirs))
    process.start()
    assert ours.poll(60)
    assert ours.recv() == "held"
    if not verb:
        os.kill(process.pid, signal.SIGSTOP)
    _wait_until_stopped(process.pid)
    # Inside the lock of a local file it would keep its successor out, which is not what is asked here.
    while not verb and list(tmp_path.rglob(f"*{LOCK_SUFFIX}")):
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)
        _wait_until_stopped(process.pid)
    try:
        with Lease(storage, root, RENEW_S) as successor:
            os.kill(process.pid, signal.SIGCONT)
            if verb != "delete":
                assert ours.poll(30)
                lost, said = ours.recv()
                assert lost
                assert "a newer run took this output over" in said
            process.join(60)
            assert process.exitcode == 0
            time.sleep(2 * RENEW_S)
            successor.check()
            assert not successor.lost.is_set()
            assert holder(storage, root)["pid"] == os.getpid()
    finally:
        process.kill()
    assert storage.read_optional(join(root, "lease.json")) is None


def test_several_folders_are_held_and_given_back_together(storage: Storage, root: str) -> None:
    folders = [join(root, "b"), join(root, "a"), join(root, "b") + "/", join(root, "c", "reranked")]
    with Leases(storage, folders, RENEW_S) as leases:
        leases.check()
        for name in ("a", "b", "c/reranked"):
            with (
                pytest.raises(OutputBusyError, match="is writing this output") as caught,
                Lease(storage, join(root, name), RENEW_S),
            ):
                pass
            assert join(root, name) in str(caught.value)
        assert not leases.lost.is_set()
    assert storage.list_files(root) == []


def test_of_several_folders_all_are_held_or_none(storage: Storage, root: str) -> None:
    folders = [join(root, name) for name in "abc"]
    with Lease(storage, folders[1], RENEW_S) as other:
        with pytest.raises(OutputBusyError), Leases(storage, folders, RENEW_S):
            pass
        other.check()
        assert [info.uri for info in storage.list_files(root)] == [
            storage.info(join(folders[1], "lease.json")).uri
        ]
    with Leases(storage, folders, RENEW_S) as leases:
        leases.check()


def test_jobs_with_two_common_folders_do_not_wait_for_each_other(storage: Storage, root: str) -> None:
    won, refused = [], []
    done = threading.Event()

    def run(names: str) -> None:
        try:
            with Leases(storage, [join(root, name) for name in names], RENEW_S) as leases:
                won.append(names)
                done.wait(20)
                leases.check()
        except OutputBusyError:
            refused.append(names)

    threads = [threading.Thread(target=run, args=(names,)) for names in ("ab", "ba", "bca", "acb")]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 15
    while len(refused) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 3)
    assert storage.list_files(root) == []


def test_one_folder_lost_ends_the_run_and_the_others_are_given_back(storage: Storage, root: str) -> None:
    folders = [join(root, name) for name in "abc"]
    with Leases(storage, folders, RENEW_S) as leases:
        storage.write(join(folders[1], "lease.json"), b'{"run_id": "newer"}')
        assert leases.lost.wait(10)
        with pytest.raises(TakenOverError, match=folders[1]):
            leases.check()
    assert [info.size for info in storage.list_files(root)] == [len(b'{"run_id": "newer"}')]


def test_a_busy_output_has_an_exit_code_by_which_schedulers_try_again() -> None:
    assert OutputBusyError.exit_code == os.EX_TEMPFAIL


def test_of_many_that_find_a_dead_holder_one_goes_on(storage: Storage, tmp_path) -> None:
    root = str(tmp_path)
    leave_behind(storage, root, pid=999_999, process_started=0.0)
    won, refused = [], []
    done = threading.Event()

    def run() -> None:
        try:
            with Lease(storage, root, RENEW_S) as lease:
                won.append(lease)
                done.wait(20)
        except OutputBusyError as error:
            refused.append(error)

    threads = [threading.Thread(target=run) for _ in range(5)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 15
    while len(refused) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 4)


def test_a_store_that_is_away_for_a_while_costs_no_lease(storage: Storage, s3_server, bucket: str) -> None:
    with Lease(storage, bucket, RENEW_S) as lease:
        before = holder(storage, bucket)["beat"]
        s3_server.kill()
        time.sleep(3 * RENEW_S)
        s3_server.start()
        deadline = time.monotonic() + 30
        while holder(storage, bucket)["beat"] <= before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert holder(storage, bucket)["beat"] > before
        lease.check()


@pytest.mark.slow
def test_an_error_of_the_run_is_not_hidden_by_the_lease(s3_server, bucket: str, monkeypatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"retries": {"max_attempts": 0}}})
    try:
        with pytest.raises(ZeroDivisionError), Lease(Storage(0.5), bucket, RENEW_S):
            s3_server.kill()
            raise ZeroDivisionError
    finally:
        s3_server.start()
