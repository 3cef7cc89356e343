"""`python -m jobs.spot_notice`: on a node that its cloud is about to take back, tells Ray so.

Ray then gives the node no new work, and the run counts what dies with it as nobody's fault. The
cluster file starts this on every worker; away from a cloud it ends at once.
"""

import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field

_TIMEOUT_SECONDS = 2.0
_LOOK_SECONDS = 5.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this machine's own
_DEADLINE_SECONDS = 110  # AWS says so two minutes ahead, Google half a minute


@dataclass(frozen=True, slots=True)
class Cloud:
    """Where a cloud tells a machine that it will be taken back."""

    name: str
    notice_url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    token_url: str | None = None

    def is_here(self) -> bool:
        """Whether this machine is one of its."""
        try:
            self.is_noticed()
        except OSError:
            return False
        return True

    def is_noticed(self) -> bool:
        """Whether it will be taken back. Raises OSError when the cloud does not answer."""
        headers = dict(self.headers)
        if self.token_url is not None:
            ask = {"X-aws-ec2-metadata-token-ttl-seconds": "300"}
            headers["X-aws-ec2-metadata-token"] = _answer(self.token_url, ask, "PUT") or ""
        answer = _answer(self.notice_url, headers)
        return answer is not None and answer.strip() != "FALSE"


CLOUDS = (
    Cloud(
        "aws",
        "http://169.254.169.254/latest/meta-data/spot/instance-action",
        token_url="http://169.254.169.254/latest/api/token",
    ),
    Cloud(
        "gcp",
        "http://169.254.169.254/computeMetadata/v1/instance/preempted",
        headers={"Metadata-Flavor": "Google"},
    ),
)


def watch(cloud: Cloud, *, look_seconds: float = _LOOK_SECONDS) -> None:
    """Return once this node is to be taken back and Ray knows of it.

    Raises CalledProcessError when Ray refuses to drain the node.
    """
    never = threading.Event()
    while not _is_noticed(cloud):
        never.wait(look_seconds)
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", f"{cloud.name} takes this spot node back"]
    command += ["--deadline-remaining-seconds", str(_DEADLINE_SECONDS)]
    subprocess.run(command, check=True)


def _is_noticed(cloud: Cloud) -> bool:
    try:
        return cloud.is_noticed()
    except OSError:
        return False  # it may well answer the next time


def _answer(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """Return what a metadata service says, or None if there is nothing under that address."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with _DIRECT.open(request, timeout=_TIMEOUT_SECONDS) as response:
            return str(response.read(65536).decode())
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


if __name__ == "__main__":
    here = next((cloud for cloud in CLOUDS if cloud.is_here()), None)
    if here is None:
        sys.exit("no cloud answers here: nobody will take this machine back")
    watch(here)
