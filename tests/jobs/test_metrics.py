"""What Prometheus sees of a run: Ray exports what the workers count."""

import socket
import urllib.request

import pytest
from ray_box import by_value, ray_cluster
from small_stages import Box

from jobs.driver import work_on_ray
from jobs.ray_start import RayPlace
from jobs.run_config import RunConfig


@pytest.mark.slow  # Ray exports every ten seconds, and only while the workers live
def test_rows_shards_and_their_times_are_exported(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config, box, seen = RunConfig(workers=1), Box(tmp_path), {}

    def should_stop():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            for line in page.read().decode().splitlines():
                name, _, value = line.rpartition(" ")
                if name.startswith("ray_capfilt_"):
                    seen[name.partition("{")[0]] = float(value)
        return "ray_capfilt_rows_total" in seen

    def work(stages, board, watching):
        work_on_ray(stages, board, watching, config, RayPlace(is_own=False, has_gpus=False))

    with ray_cluster(num_cpus=2, metrics_export_port=port):
        by_value("small_stages")
        box.run([box.stage(seconds=0.2)], 2000, config, work, should_stop=should_stop)
    assert seen["ray_capfilt_rows_total"] > 0
    assert seen["ray_capfilt_shards_total"] > 0
    assert seen["ray_capfilt_shard_seconds_count"] > 0
