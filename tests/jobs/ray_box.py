"""A small Ray cluster of several raylets on this machine, quiet and without authentication.

To be started and stopped on the main thread, for Ray sets signal handlers there.
"""

import logging
import os
import sys
from contextlib import contextmanager

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Ray's workers give way to every other process; on a busy machine tests would wait for them.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray  # noqa: E402  (the environment comes first)
from ray.cluster_utils import Cluster  # noqa: E402

# A dead node is noticed in about two seconds.
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


def by_value(*modules):
    """Have what a test module defines travel to workers, which cannot import it."""
    for name in modules:
        ray.cloudpickle.register_pickle_by_value(sys.modules[name])


@contextmanager
def ray_cluster(**head):
    """Give a cluster whose head has these resources; this process is connected to it."""
    node = {
        "num_cpus": 4,
        "object_store_memory": 80 * 2**20,
        "include_dashboard": False,
        "_system_config": HEALTH,
    }
    cluster = Cluster(initialize_head=True, head_node_args={**node, **head})
    try:
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
