"""The Kubernetes manifest has the shape that KubeRay and Kubernetes define, and opens nothing."""

from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "jobs" / "kuberay.yaml"


def strict(required, **properties):
    """Return the schema of an object that has these keys and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
    }


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
ITEMS = {"type": "array", "items": {"type": "object"}}
CONTAINER = strict(
    ("name", "image", "resources"),
    name=TEXT,
    image=TEXT,
    resources=strict(("requests", "limits"), requests=TEXTS, limits=TEXTS),
    ports={"type": "array", "items": strict(("containerPort",), containerPort=COUNT, name=TEXT)},
    env=ITEMS,
    volumeMounts={
        "type": "array",
        "items": strict(("name", "mountPath"), name=TEXT, mountPath=TEXT),
    },
    securityContext=strict((), allowPrivilegeEscalation={"const": False}),
)
POD = strict(
    ("spec",),
    metadata={"type": "object"},
    spec=strict(
        ("containers",),
        containers={"type": "array", "items": CONTAINER, "minItems": 1},
        restartPolicy={"const": "Never"},
        serviceAccountName=TEXT,
        terminationGracePeriodSeconds=COUNT,
        nodeSelector=TEXTS,
        tolerations=ITEMS,
        volumes=ITEMS,
    ),
)
# The fields of ray.io/v1 RayCluster as of KubeRay 1.5, those that have nothing to do here left out.
RAY_CLUSTER = strict(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata=strict(("name",), name=TEXT, labels=TEXTS, annotations=TEXTS),
    spec=strict(
        ("headGroupSpec", "rayVersion"),
        rayVersion=TEXT,
        authOptions=strict(("mode",), mode={"enum": ["token", "disabled"]}),
        enableInTreeAutoscaling={"type": "boolean"},
        autoscalerOptions=strict(
            (),
            version={"enum": ["v1", "v2"]},
            upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
            idleTimeoutSeconds=COUNT,
            resources={"type": "object"},
            env=ITEMS,
        ),
        headServiceAnnotations=TEXTS,
        headGroupSpec=strict(
            ("template", "rayStartParams"),
            serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
            rayStartParams=TEXTS,
            template=POD,
        ),
        workerGroupSpecs={
            "type": "array",
            "items": strict(
                ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
                groupName=TEXT,
                replicas=COUNT,
                minReplicas=COUNT,
                maxReplicas=COUNT,
                idleTimeoutSeconds=COUNT,
                numOfHosts=COUNT,
                rayStartParams=TEXTS,
                template=POD,
            ),
        },
    ),
)


def documents():
    return list(yaml.safe_load_all(MANIFEST.read_text()))


def of_kind(kind):
    return next(document for document in documents() if document["kind"] == kind)


def containers():
    spec = of_kind("RayCluster")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield from group["template"]["spec"]["containers"]


def test_the_manifest_has_kuberays_shape():
    jsonschema.validate(of_kind("RayCluster"), RAY_CLUSTER)


@pytest.mark.parametrize(
    "slip",
    [
        lambda spec: spec.update(authOption={"mode": "token"}),
        lambda spec: spec["workerGroupSpecs"][0].update(maxReplica=3),
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: spec["headGroupSpec"].pop("template"),
    ],
    ids=["unknown key", "misspelt key", "a number for a text", "a key is missing"],
)
def test_a_slip_would_be_noticed(slip):
    manifest = of_kind("RayCluster")
    slip(manifest["spec"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, RAY_CLUSTER)


def test_it_has_the_pools_of_the_cluster_file():
    spec = of_kind("RayCluster")["spec"]
    cluster = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    pools = {
        name: (node["min_workers"], node["max_workers"], str(node["resources"].get("GPU", 0)))
        for name, node in cluster["available_node_types"].items()
        if name != cluster["head_node_type"]
    }
    groups = {
        group["groupName"]: (
            group["minReplicas"],
            group["maxReplicas"],
            group["template"]["spec"]["containers"][0]["resources"]["limits"].get(
                "nvidia.com/gpu", "0"
            ),
        )
        for group in spec["workerGroupSpecs"]
    }
    assert groups == pools
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_its_ray_is_the_pinned_one():
    pinned = next(
        line.removeprefix("ray==").strip()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("ray==")
    )
    assert of_kind("RayCluster")["spec"]["rayVersion"] == pinned
    assert f"rayproject/ray:{pinned}-" in MANIFEST.read_text()


def test_nothing_is_reachable_from_outside():
    spec = of_kind("RayCluster")["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert {document["kind"] for document in documents()} == {
        "RayCluster",
        "ServiceAccount",
        "NetworkPolicy",
    }
    policy = of_kind("NetworkPolicy")["spec"]
    own = {"ray.io/cluster": of_kind("RayCluster")["metadata"]["name"]}
    assert policy["podSelector"]["matchLabels"] == own
    assert policy["policyTypes"] == ["Ingress"]
    admitted = [source["podSelector"]["matchLabels"] for rule in policy["ingress"]
                for source in rule["from"]]  # fmt: skip
    assert admitted == [own, {"app.kubernetes.io/name": "kuberay-operator"}]


def test_every_container_has_bounds_and_gains_no_rights():
    for container in containers():
        assert container["resources"]["limits"]["memory"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False}
        assert not container.get("env"), "the token comes from KubeRay, not from this file"
