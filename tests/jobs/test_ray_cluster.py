"""The cluster file: Ray accepts it, it opens nothing to the world, and it has prices."""

import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from jobs.cluster_file import load_cluster_file
from jobs.errors import UserError

CLUSTER_FILE = Path(__file__).parents[2] / "ray_cluster.yaml"
GCP_PROVIDER = {
    "type": "gcp",
    "region": "us-central1",
    "availability_zone": "us-central1-a",
    "project_id": "a-project",
}


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


def saved(tmp_path, document):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


# --- Ray --------------------------------------------------------------------------------------


def test_ray_accepts_the_cluster_file(validate):
    complete = validate(cluster())
    assert complete["head_node_type"] == "head"


def test_ray_accepts_it_for_google_too(validate):
    assert validate(cluster() | {"provider": GCP_PROVIDER})["provider"]["type"] == "gcp"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("available_node_types", "score", "max_wokers"), 3),
        (("setup_comands",), []),
        (("available_node_types", "download", "resources"), {"CPU": "many"}),
        (("head_node_type",), "haed"),
        (("provider",), {"type": "abacus"}),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_ray_would_notice_a_slip(validate, path, value):
    wrong = cluster()
    inner = wrong
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, NotImplementedError, ValueError)):
        validate(wrong)


def test_every_pool_grows_from_zero():
    pools = {k: v for k, v in cluster()["available_node_types"].items() if k != "head"}
    assert set(pools) == {"download", "score", "train"}
    assert all(pool["min_workers"] == 0 for pool in pools.values())
    assert sum(pool["max_workers"] for pool in pools.values()) == cluster()["max_workers"]


def test_nothing_runs_on_the_head_but_the_driver():
    assert cluster()["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in " ".join(cluster()["head_start_ray_commands"])


def test_nothing_listens_beyond_the_cluster():
    commands = " ".join(cluster()["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands
    for each in (commands, " ".join(cluster()["worker_start_ray_commands"])):
        assert "RAY_AUTH_MODE=token" in each
        assert "RAY_AUTH_TOKEN_PATH=" in each
        assert "RAY_AUTH_TOKEN=" not in each  # a job could print it
    assert "0.0.0.0" not in CLUSTER_FILE.read_text()
    assert "chmod 600 ~/.ray/auth_token" in cluster()["setup_commands"]


def test_the_start_commands_find_ray_and_python_in_the_virtual_environment(tmp_path):
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "ray").write_text(
        '#!/bin/bash\necho "$@"; type -p python; echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH"\n'
    )
    (venv / "python").write_text("#!/bin/bash\n")
    for name in ("ray", "python"):
        (venv / name).chmod(0o755)
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        done = subprocess.run(
            ["bash", "-c", next(each for each in cluster()[commands] if "ray start" in each)],
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "RAY_HEAD_IP": "10.0.0.1"},
            capture_output=True,
            text=True,
            check=True,
        )
        arguments, python, auth = done.stdout.splitlines()
        assert arguments.startswith("start ")
        assert python == str(venv / "python")
        assert auth == f"token {tmp_path}/.ray/auth_token"


def test_nothing_heavy_or_secret_is_copied_to_the_nodes():
    left_out = set(cluster()["rsync_exclude"])
    assert {".venv/", ".git/", "capfilt-demo/", "corpus/", "*.tar", "*.parquet"} <= left_out


# --- as `capfilt plan` reads it ---------------------------------------------------------------


def test_the_pools_are_told_by_what_they_have():
    read = load_cluster_file(str(CLUSTER_FILE))
    assert read.place == "aws us-east-1"
    assert read.head.name == "head"
    download, score = read.download_pool(), read.score_pool()
    assert (download.name, download.num_cpus, download.is_spot) == ("download", 16, True)
    assert (score.name, score.num_gpus, score.accelerator) == ("score", 4, "L4")
    assert not score.is_spot
    assert [pool.name for pool in read.pools if pool.is_for_training] == ["train"]


def test_every_price_says_where_it_is_from():
    assert "check" in load_cluster_file(str(CLUSTER_FILE)).prices.source


def test_google_s_machines_and_spot_nodes_are_read_too(tmp_path):
    document = cluster() | {"provider": GCP_PROVIDER}
    document["available_node_types"]["download"]["node_config"] = {
        "machineType": "n2-standard-16",
        "scheduling": [{"preemptible": True}],
    }
    read = load_cluster_file(saved(tmp_path, document))
    assert read.place == "gcp us-central1"
    assert read.download_pool().machine == "n2-standard-16"
    assert read.download_pool().is_spot


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("metadata"), "no metadata.prices"),
        (
            lambda d: d["metadata"]["prices"]["usd_per_node_hour"].pop("score"),
            "usd_per_node_hour: 'score' is missing",
        ),
        (
            lambda d: d["metadata"]["prices"].update(usd_per_gpu=3),
            "metadata.prices.usd_per_gpu: Extra inputs",
        ),
        (lambda d: d.pop("available_node_types"), "'available_node_types'"),
        (lambda d: d.update(head_node_type="haed"), "head_node_type 'haed'"),
        (lambda d: d["available_node_types"]["score"].pop("resources"), "'resources'"),
    ],
    ids=["no prices", "a price", "a slip", "no pools", "head", "no resources"],
)
def test_what_a_plan_lacks_is_named_with_its_file(tmp_path, change, message):
    document = cluster()
    change(document)
    path = saved(tmp_path, document)
    with pytest.raises(UserError, match=message) as error:
        load_cluster_file(path)
    assert str(error.value).startswith(path)


def test_a_cluster_without_gpus_cannot_score(tmp_path):
    document = cluster()
    del document["available_node_types"]["score"]
    read = load_cluster_file(saved(tmp_path, document))
    with pytest.raises(UserError, match="a pool with GPUs for scoring is missing"):
        read.score_pool()
