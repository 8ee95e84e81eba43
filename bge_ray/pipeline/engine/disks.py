"""Do all nodes see the folders that a run writes? One path means another disk on each machine."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bge_ray.errors import SettingsError, StorageError
from bge_ray.pipeline.engine.stopping import POLL_S
from bge_ray.storage.folders import place
from bge_ray.storage.lease import holder_of
from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import OwnedFolder

# What a client of a network disk may go on believing of a folder that it looked into before.
LATE_S = 60.0
LOOK_EVERY_S = 1.0


def refuse_unseen(folders: Sequence[OwnedFolder], watch: Callable[[], None], late_s: float = LATE_S) -> None:
    """Refuse folders on a disk that another node of the cluster does not share: its files would be lost.

    To be called while the run holds their leases, once the nodes are there and before they work.

    Args:
        folders: that are written.
        watch: called while nodes look; raises to stop.
        late_s: how long what this process wrote may take to be seen elsewhere.

    Raises:
        SettingsError: names the node that does not see a folder, and the ways out.
    """
    for folder in folders:
        if place(folder.uri).protocol == "memory":
            raise SettingsError(
                f"{folder.key} {folder.uri}: is the memory of this process, and others write there; choose a "
                "folder that all nodes share, or object storage"
            )
    local = [folder for folder in folders if place(folder.uri).protocol == "file"]
    here = ray.get_runtime_context().get_node_id()
    # One without a CPU, such as a head that only leads, does none of the work.
    others = [
        node
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here and node["Resources"].get("CPU", 0)
    ]
    if not local or not others:
        return
    expected = [(folder.storage, folder.uri, holder_of(folder.storage, folder.uri)) for folder in local]
    looks = {_on(node["NodeID"]).remote(expected, late_s): node["NodeManagerAddress"] for node in others}
    pending = list(looks)
    try:
        while pending:
            watch()
            ended, pending = ray.wait(pending, timeout=POLL_S)
            for reference in ended:
                refuse_unseen_by(looks[reference], local, _seen(reference, len(local)))
    finally:
        for reference in pending:
            ray.cancel(reference)


def refuse_unseen_by(node: str, folders: Sequence[OwnedFolder], seen: Sequence[bool]) -> None:
    """Refuse the first folder that a node does not see.

    Raises:
        SettingsError: there is one.
    """
    for folder, is_seen in zip(folders, seen, strict=True):
        if not is_seen:
            raise SettingsError(
                f"{folder.key} {folder.uri}: node {node} of the cluster does not see what this run writes "
                "there, and what it wrote there would be lost; choose a folder that all nodes share, or "
                "object storage"
            )


def look(expected: Sequence[tuple[Storage, str, str | None]], late_s: float) -> list[bool]:
    """Tell of each folder whether the lease that lies there is the expected one, which may come late."""
    deadline = time.monotonic() + late_s
    while True:
        seen = [_lies(*one) for one in expected]
        if all(seen) or time.monotonic() > deadline:
            return seen
        time.sleep(LOOK_EVERY_S)


def _lies(storage: Storage, uri: str, holder: str | None) -> bool:
    try:
        return holder_of(storage, uri) == holder
    except StorageError:
        return False


def _on(node_id: str) -> Any:
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=where)(look)


def _seen(reference: Any, count: int) -> list[bool]:
    """Return what a node saw; of one that died meanwhile nothing is held against the folders."""
    try:
        found: list[bool] = ray.get(reference)
    except RayError:
        return [True] * count
    return found
