"""The manifests, against Kubernetes' own schemas (pod templates included) and the fields that KubeRay's resources have."""

import importlib
import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pipeline.command import find_recipe
from pipeline.config import load_config
from pipeline.stages import STAGES

FOLDER = Path(__file__).resolve().parents[2] / "docker" / "kuberay"
KUBERNETES = "1.33"
DOCUMENTS: list[dict[str, Any]] = [
    document for path in sorted(FOLDER.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
]
OF_RAY = {document["kind"]: document for document in DOCUMENTS if document["apiVersion"] == "ray.io/v1"}

# KubeRay 1.5's fields, of those that are useful here, and their values: no registry offers its schemas, so this was compared with
# the Go types that they are made from (ray-operator/apis/ray/v1/*_types.go).
POD = "pod template"
STRINGS = "map of strings"
AUTOSCALER = {
    "version": {"v1", "v2"},
    "idleTimeoutSeconds": int,
    "upscalingMode": {"Conservative", "Default", "Aggressive"},
    "resources": dict,
}
HEAD = {"rayStartParams": STRINGS, "template": POD, "serviceType": {"ClusterIP", "NodePort", "LoadBalancer"}}
GROUP = {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "rayStartParams": STRINGS,
    "template": POD,
}
CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": {"token", "disabled"}, "secretName": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": AUTOSCALER,
    "headGroupSpec": HEAD,
    "workerGroupSpecs": [GROUP],
}
SPECS: dict[str, Any] = {
    "RayCluster": CLUSTER,
    "RayJob": {
        "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
        "backoffLimit": int,
        "submitterConfig": {"backoffLimit": int},
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "activeDeadlineSeconds": int,
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "rayClusterSpec": CLUSTER,
    },
    "RayService": {"serveConfigV2": str, "rayClusterConfig": CLUSTER},
}


def check(value: Any, schema: Any, where: str) -> None:
    if schema == POD:
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": value}
        kubernetes_validate.validate(template, KUBERNETES, strict=True)
    elif schema == STRINGS:
        assert all(type(inner) is str for inner in value.values()), f"{where}: {value}"
    elif isinstance(schema, set):
        assert value in schema, f"{where} is {value!r}"
    elif isinstance(schema, dict):
        assert set(value) <= set(schema), f"{where}: unknown {set(value) - set(schema)}"
        for key, inner in value.items():
            check(inner, schema[key], f"{where}.{key}")
    elif isinstance(schema, list):
        for number, inner in enumerate(value):
            check(inner, schema[0], f"{where}[{number}]")
    else:
        assert type(value) is schema, f"{where} is {value!r}"


def pod_specs(kind: str) -> dict[str, dict[str, Any]]:
    spec = OF_RAY[kind]["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    found = {"head": cluster["headGroupSpec"]["template"]}
    return found | {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: f"{d['kind']}-{d['metadata']['name']}")
def test_manifests_are_valid(document: dict[str, Any]) -> None:
    if document["apiVersion"] == "ray.io/v1":
        assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
        check(document["spec"], SPECS[document["kind"]], document["kind"])
    elif document["kind"] == "PodMonitor":
        assert document["spec"]["podMetricsEndpoints"] == [{"port": "metrics"}]  # KubeRay names the port so.
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_checks_find_mistakes() -> None:
    with pytest.raises(AssertionError, match="unknown {'headGroup'}"):
        check({"headGroup": {}}, CLUSTER, "x")
    with pytest.raises(AssertionError, match="num-cpus"):
        check({"headGroupSpec": {"rayStartParams": {"num-cpus": 0}}}, CLUSTER, "x")
    with pytest.raises(AssertionError, match="x.authOptions.mode is 'tokens'"):
        check({"authOptions": {"mode": "tokens"}}, CLUSTER, "x")
    with pytest.raises(kubernetes_validate.ValidationError):
        check({"spec": {"containers": [{"name": "x", "imagee": "y"}]}}, POD, "x")


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_pods_are_confined_and_know_the_store(kind: str) -> None:
    claims = {d["metadata"]["name"] for d in DOCUMENTS if d["kind"] == "PersistentVolumeClaim"}
    given = {(d["kind"], d["metadata"]["name"]) for d in DOCUMENTS if d["kind"] in ("Secret", "ConfigMap")}
    for name, template in pod_specs(kind).items():
        pod = template["spec"]
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "ray-distill"
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        (container,) = pod["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        used = {
            ("Secret" if "secretRef" in source else "ConfigMap", next(iter(source.values()))["name"])
            for source in container["envFrom"]
        }
        assert used and used <= given
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert volumes["data"]["persistentVolumeClaim"]["claimName"] in claims
        wants_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert (name == "gpu") == wants_gpu == (container["image"] == "ray-distill:cuda")


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_decoding_and_teachers_scale_by_themselves(kind: str) -> None:
    spec = OF_RAY[kind]["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    assert cluster["enableInTreeAutoscaling"] and cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert set(groups) == {"decode", "gpu"}
    for group in groups.values():
        assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
    assert groups["gpu"]["minReplicas"] == 0, "idle GPUs are paid for"


def test_the_jobs_entrypoint_is_a_command_of_this_product() -> None:
    spec = OF_RAY["RayJob"]["spec"]
    command, *arguments = shlex.split(spec["entrypoint"])
    assert command == "ray-distill" and arguments[0] == "--config"
    config = load_config(Path(find_recipe(arguments[1])), arguments[2:])
    # What a Ray job asks of its paths (pipeline.stages.Run).
    assert config.runs.is_absolute() and config.corpus.path.is_absolute() and config.cache.is_absolute
    assert config.cache.location.startswith("s3://") and spec["backoffLimit"] > 0
    assert "--stages" not in arguments or set(arguments[arguments.index("--stages") + 1].split(",")) <= set(STAGES)
    cluster = spec["rayClusterSpec"]
    gpu = next(group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu")
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.cache.actors <= gpu["maxReplicas"] * int(limits["nvidia.com/gpu"])
    assert config.cache.cpus_per_actor <= int(limits["cpu"])


def test_the_service_is_there_under_its_name() -> None:
    application = yaml.safe_load(OF_RAY["RayService"]["spec"]["serveConfigV2"])["applications"][0]
    module, name = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert [deployment["name"] for deployment in application["deployments"]] == ["FeatureService"]


def test_the_network_is_closed_but_for_named_callers() -> None:
    policy = next(document for document in DOCUMENTS if document["kind"] == "NetworkPolicy")["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    for rule in policy["ingress"]:
        for source in rule["from"]:
            assert source.get("podSelector"), "a rule lets a whole namespace in"
    budgets = {
        d["metadata"]["name"]: d["spec"]["maxUnavailable"] for d in DOCUMENTS if d["kind"] == "PodDisruptionBudget"
    }
    assert budgets == {"ray-distill-head": 0, "ray-distill-workers": 1}


def test_versions_are_those_that_are_pinned() -> None:
    for kind, document in OF_RAY.items():
        spec = document["spec"]
        cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
        pins = (FOLDER.parents[1] / "requirements.txt").read_text()
        assert f"\nray=={cluster['rayVersion']}\n" in pins, kind
