"""A cluster of three nodes in one process: run the job, remove a node with encoders on it, go on to the end.

Run as a script with the settings as JSON, so that its cluster does not meet that of the tests.
"""

import json
import sys
import threading
import time


def main() -> None:
    """Run the job to its end, removing a node after three more units are done."""
    import ray
    from ray.cluster_utils import Cluster

    from bge_ray.pipeline.embed.job import embed
    from bge_ray.settings.sections import parse_settings
    from bge_ray.storage.objects import Storage

    keys = json.loads(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "node_ip_address": "127.0.0.1"})
    nodes = [cluster.add_node(num_cpus=2, node_ip_address="127.0.0.1") for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    done = f"{keys['output.uri']}/done"
    storage = Storage(30)
    removed = threading.Event()

    def lose_a_node() -> None:
        before = len(storage.list_files(done))
        while len(storage.list_files(done)) < before + 3:
            time.sleep(0.05)
        cluster.remove_node(nodes[0], allow_graceful=False)
        removed.set()

    thread = threading.Thread(target=lose_a_node)
    thread.start()
    result = embed(parse_settings(None, [f"{k}={v}" for k, v in keys.items()]))
    thread.join()
    ray.shutdown()
    cluster.shutdown()
    print("node removed:", removed.is_set(), result.report.outcome)


if __name__ == "__main__":
    main()
