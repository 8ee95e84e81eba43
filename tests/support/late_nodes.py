"""A cluster without GPUs that is given some late: prints what `await_nodes` did before and after.

Run as a script, so that its cluster does not meet that of the tests.
"""

import time


def main() -> None:
    """Wait in vain, then for nodes that come after some seconds; prints one line for each."""
    import ray
    from ray.cluster_utils import Cluster

    from bge_ray.errors import IncompleteRunError
    from bge_ray.pipeline.engine.nodes import await_nodes
    from bge_ray.settings.sections import ResourcesSettings

    asks = []
    place = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **place})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    joined = ResourcesSettings(address=cluster.address)
    try:
        await_nodes(joined, "resources.num_encoders", 2, 1.0, lambda: None, wait_s=3)
    except IncompleteRunError as error:
        print("in vain:", error)

    def watch() -> None:
        asks.append(time.monotonic())
        if len(asks) == 5:
            for _ in range(2):  # GPUs that only Ray believes in
                cluster.add_node(num_cpus=1, num_gpus=1, **place)

    await_nodes(joined, "resources.num_encoders", 2, 1.0, watch)
    # A placement group that was left behind would keep what it reserved.
    deadline = time.monotonic() + 20
    while ray.available_resources().get("GPU") != 2.0 and time.monotonic() < deadline:
        time.sleep(0.1)
    print(f"came: {len(asks) >= 5} free GPUs {ray.available_resources().get('GPU')}")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
