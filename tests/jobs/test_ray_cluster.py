"""The cluster file is one that Ray accepts, and one that opens nothing to the world."""

from pathlib import Path

import pytest
import yaml

CLUSTER_FILE = Path(__file__).parents[2] / "ray_cluster.yaml"


@pytest.fixture(scope="module")
def validate():
    from ray.autoscaler._private.util import prepare_config, validate_config

    def prepared(cluster):
        complete = prepare_config(cluster)
        validate_config(complete)
        return complete

    return prepared


def cluster():
    return yaml.safe_load(CLUSTER_FILE.read_text())


def test_ray_accepts_the_cluster_file(validate):
    complete = validate(cluster())
    assert complete["head_node_type"] == "head"


def test_ray_would_notice_a_misspelt_key(validate):
    wrong = cluster()
    wrong["available_node_types"]["score"]["max_wokers"] = 3
    with pytest.raises(Exception, match="max_wokers"):
        validate(wrong)


def test_every_pool_grows_from_zero():
    pools = {k: v for k, v in cluster()["available_node_types"].items() if k != "head"}
    assert set(pools) == {"download", "score", "train"}
    assert all(pool["min_workers"] == 0 for pool in pools.values())


def test_nothing_listens_beyond_the_cluster():
    commands = " ".join(cluster()["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands
    assert "RAY_AUTH_MODE=token" in commands
    assert "RAY_AUTH_MODE=token" in " ".join(cluster()["worker_start_ray_commands"])
    assert "0.0.0.0" not in CLUSTER_FILE.read_text()
