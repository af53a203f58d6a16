"""The manifests conform to Kubernetes' schemas, pod templates included, and to the fields of KubeRay's resources."""

import importlib
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.scripts.scripts import cli as ray_command
from ray.serve.schema import ServeDeploySchema

from ray_distill.pipeline.config import load_config
from ray_distill.pipeline.recipes import find_recipe
from ray_distill.pipeline.stages import STAGES

FOLDER = Path(__file__).resolve().parents[2] / "docker" / "kuberay"
KUBERNETES = "1.33"
DOCUMENTS: list[dict[str, Any]] = [
    document
    for path in sorted(FOLDER.glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
    if path.name != "kustomization.yaml"
]
OF_RAY = {document["kind"]: document for document in DOCUMENTS if document["apiVersion"] == "ray.io/v1"}

# Fields of KubeRay 1.5 that are useful here, and their types. No registry offers KubeRay's schemas, so this was compared with the Go
# types from which they are generated (ray-operator/apis/ray/v1/*_types.go).
POD = "pod template"
STRINGS = "map of strings"
SECURITY = "security context of a container"
MOUNTS = "volume mounts of a container"
AUTOSCALER = {
    "version": {"v1", "v2"},
    "idleTimeoutSeconds": int,
    "upscalingMode": {"Conservative", "Default", "Aggressive"},
    "resources": dict,
    "securityContext": SECURITY,
    "volumeMounts": MOUNTS,
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
        "submitterPodTemplate": POD,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "activeDeadlineSeconds": int,
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "rayClusterSpec": CLUSTER,
    },
    "RayService": {"serveConfigV2": str, "rayClusterConfig": CLUSTER, "excludeHeadPodFromServeSvc": bool},
}


def check(value: Any, schema: Any, where: str) -> None:
    if schema == POD:
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": value}
        kubernetes_validate.validate(template, KUBERNETES, strict=True)
    elif schema == SECURITY:
        check({"spec": {"containers": [{"name": "x", "securityContext": value}]}}, POD, where)
    elif schema == MOUNTS:
        check({"spec": {"containers": [{"name": "x", "volumeMounts": value}]}}, POD, where)
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


def cluster_of(kind: str) -> dict[str, Any]:
    spec: dict[str, Any] = OF_RAY[kind]["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pod_specs(kind: str) -> dict[str, dict[str, Any]]:
    cluster = cluster_of(kind)
    found = {"head": cluster["headGroupSpec"]["template"]}
    return found | {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: f"{d['kind']}-{d['metadata']['name']}")
def test_manifests_are_valid(document: dict[str, Any]) -> None:
    if document["apiVersion"] == "ray.io/v1":
        assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
        check(document["spec"], SPECS[document["kind"]], document["kind"])
    elif document["kind"] == "PodMonitor":
        assert document["spec"]["podMetricsEndpoints"] == [{"port": "metrics"}]  # KubeRay gives the port this name.
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
    with pytest.raises(kubernetes_validate.ValidationError):
        check({"securityContext": {"privilegeEscalation": False}}, AUTOSCALER, "x")


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_pods_are_confined_and_know_the_store(kind: str) -> None:
    claims = {d["metadata"]["name"] for d in DOCUMENTS if d["kind"] == "PersistentVolumeClaim"}
    given = {(d["kind"], d["metadata"]["name"]) for d in DOCUMENTS if d["kind"] in ("Secret", "ConfigMap")}
    for name, template in pod_specs(kind).items():
        pod = template["spec"]
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "ray-distill"
        (container,) = pod["containers"]
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        used = {
            ("Secret" if "secretRef" in source else "ConfigMap", next(iter(source.values()))["name"])
            for source in container.get("envFrom", [])
        }
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert volumes["data"]["persistentVolumeClaim"]["claimName"] in claims
        (data,) = [mount for mount in container["volumeMounts"] if mount["name"] == "data"]
        if kind == "RayService":  # Its pods take input of strangers.
            assert not used, "the service has the keys of the store"
            assert data == {"name": "data", "mountPath": "/data/runs", "subPath": "runs", "readOnly": True}
        else:
            assert used == given and data == {"name": "data", "mountPath": "/data"}
        # KubeRay mounts shared memory up to the container's limit, but only if nothing else is mounted there.
        assert "/dev/shm" not in {mount["mountPath"] for mount in container["volumeMounts"]}
        wants_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert (name == "gpu") == wants_gpu == (container["image"] == "ray-distill-cuda")
        # Only the autoscaler, in the pod of the head, calls Kubernetes.
        assert pod["automountServiceAccountToken"] == (name == "head")


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_pods_keep_to_the_restricted_standard(kind: str) -> None:
    """KubeRay's own containers are confined too: the autoscaler, the job's submitter, and the worker's init container."""
    templates = list(pod_specs(kind).values())
    contexts = [cluster_of(kind)["autoscalerOptions"]["securityContext"]]
    if kind == "RayJob":
        templates.append(OF_RAY[kind]["spec"]["submitterPodTemplate"])
        assert templates[-1]["spec"]["restartPolicy"] == "Never", "a Kubernetes job needs one"
    for template in templates:
        pod = template["spec"]["securityContext"]
        assert pod["runAsNonRoot"] and pod["runAsUser"] == 1000 and pod["seccompProfile"] == {"type": "RuntimeDefault"}
        # Otherwise Kubernetes changes the owner of every file of the volume whenever a pod starts.
        assert pod["fsGroupChangePolicy"] == "OnRootMismatch"
        contexts += [container["securityContext"] for container in template["spec"]["containers"]]
        for container in template["spec"]["containers"]:
            scratch = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "scratch"}
            assert scratch == {"/tmp", "/home/ray"}, "Ray writes to these folders"
        assert {"name": "scratch", "emptyDir": {}} in template["spec"]["volumes"]
    confined = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert all(context == confined for context in contexts)


def test_whatever_is_a_sites_own_is_marked() -> None:
    images = re.findall(r" image: (\S+)", "".join(path.read_text() for path in FOLDER.glob("*.yaml")))
    customization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert {image["name"] for image in customization["images"]} == set(images)
    for image in customization["images"]:
        assert image["newName"] == "fill-in/ray-distill" and image["digest"] == "fill-in" and "newTag" not in image
    for document in DOCUMENTS:
        if document["kind"] == "PersistentVolumeClaim":
            assert document["spec"]["storageClassName"] == "fill-in"
        values = document.get("stringData", {}) | document.get("data", {})
        assert set(values.values()) <= {"fill-in"}


def test_no_two_clusters_share_a_service() -> None:
    """KubeRay names a cluster's services after the resource, for every kind."""
    names = [document["metadata"]["name"] for document in OF_RAY.values()]
    assert len(set(names)) == len(names) == 3


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_decoding_and_teachers_scale_by_themselves(kind: str) -> None:
    cluster = cluster_of(kind)
    assert cluster["enableInTreeAutoscaling"] and cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert set(groups) == {"decode", "gpu"}
    for group in groups.values():
        assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
    assert groups["gpu"]["minReplicas"] == 0, "idle GPUs are paid for"


def test_the_jobs_entrypoint_is_a_command_of_this_product() -> None:
    spec = OF_RAY["RayJob"]["spec"]
    command, subcommand, *arguments = shlex.split(spec["entrypoint"])
    assert (command, subcommand, arguments[0]) == ("ray-distill", "run", "--config")
    config = load_config(Path(find_recipe(arguments[1])), arguments[2:])
    # The requirements of a Ray job on its paths (pipeline.stages.Run).
    assert config.runs.is_absolute() and config.corpus.path.is_absolute() and config.cache.is_absolute
    assert config.cache.location.startswith("s3://") and spec["backoffLimit"] > 0
    assert "--stages" not in arguments or set(arguments[arguments.index("--stages") + 1].split(",")) <= set(STAGES)
    cluster = spec["rayClusterSpec"]
    gpu = next(group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu")
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.cache.actors <= gpu["maxReplicas"] * int(limits["nvidia.com/gpu"])
    assert config.cache.cpus_per_actor <= int(limits["cpu"])


def test_the_service_is_there_under_its_name() -> None:
    config = yaml.safe_load(OF_RAY["RayService"]["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    module, name = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    (deployment,) = application["deployments"]
    assert deployment["name"] == "FeatureService"
    # During a rollout new replicas start before old ones stop, which needs room at full load.
    assert deployment["max_surge_percent"] > 0
    replicas = deployment["autoscaling_config"]["max_replicas"]
    surge = math.ceil(replicas * deployment["max_surge_percent"] / 100)
    (group,) = cluster_of("RayService")["workerGroupSpecs"]
    cores = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert cores == deployment["ray_actor_options"]["num_cpus"] and deployment["max_replicas_per_node"] == 1
    assert group["maxReplicas"] >= replicas + surge


def test_losing_a_node_or_a_pod_leaves_the_service() -> None:
    spec = OF_RAY["RayService"]["spec"]
    assert spec["excludeHeadPodFromServeSvc"], "the head, which may start pods, takes requests of strangers"
    (deployment,) = yaml.safe_load(spec["serveConfigV2"])["applications"][0]["deployments"]
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert group["minReplicas"] >= deployment["autoscaling_config"]["min_replicas"] >= 2
    template = group["template"]
    # KubeRay adds the name of the group.
    labels = template["metadata"]["labels"] | {"ray.io/group": group["groupName"]}
    (spread,) = template["spec"]["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    documents = yaml.safe_load_all((FOLDER / "rayservice.yaml").read_text())
    (budget,) = [document["spec"] for document in documents if document["metadata"]["name"].endswith("-serve")]
    assert budget["minAvailable"] == 1
    for selector in (spread["labelSelector"], budget["selector"]):
        assert selector["matchLabels"].items() <= labels.items() and "ray.io/group" in selector["matchLabels"]
    # The pod asks for its drain, and ends after it.
    program, script = template["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][::2]
    assert program == "sh"
    drain, wait = (shlex.split(command) for command in script.split(";"))
    options = ray_command.commands[drain[1]].make_context(drain[1], drain[2:], resilient_parsing=True).params
    assert drain[0] == "ray" and options["reason"] == "DRAIN_NODE_REASON_PREEMPTION", (
        "Serve moves replicas for this reason"
    )
    deadline = options["deadline_remaining_seconds"]
    assert deployment["graceful_shutdown_timeout_s"] < deadline == int(wait[1])
    assert template["spec"]["terminationGracePeriodSeconds"] > deadline


def admits(policy: dict[str, Any], port: int, labels: dict[str, str], namespace: str | None = None) -> bool:
    """Return whether a pod with these labels may call the port; from another namespace if one is named."""

    def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
        holds = {"NotIn": lambda value, values: value not in values, "In": lambda value, values: value in values}
        rules = selector.get("matchExpressions", [])
        return selector.get("matchLabels", {}).items() <= labels.items() and all(
            holds[rule["operator"]](labels.get(rule["key"]), rule["values"]) for rule in rules
        )

    return any(
        matches(source["podSelector"], labels)
        and (
            matches(source["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
            if namespace and "namespaceSelector" in source
            else (namespace is None) == ("namespaceSelector" not in source)
        )
        for rule in policy.get("ingress", [])
        if {"port": port} in rule.get("ports", [{"port": port}])
        for source in rule["from"]
    )


def test_the_network_is_closed_but_for_named_callers() -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in DOCUMENTS if d["kind"] == "NetworkPolicy"}
    clusters, service = policies["ray-distill"], policies["ray-distill-features"]
    part = {"app.kubernetes.io/part-of": "ray-distill"}
    of_clusters = part | {"app.kubernetes.io/instance": "ray-distill"}
    of_service = part | {"app.kubernetes.io/instance": "ray-distill-features"}
    for policy, own, other in ((clusters, of_clusters, of_service), (service, of_service, of_clusters)):
        assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
        assert admits(policy, 6379, own) and not admits(policy, 6379, own, "fill-in")
        assert not admits(policy, 6379, other), (
            "the service, which takes input of strangers, reaches the other clusters"
        )
        # Labels of the operator's pod in its Helm chart and in its kustomize files.
        for name in ("kuberay-operator", "kuberay"):
            operator = {"app.kubernetes.io/name": name, "app.kubernetes.io/component": "kuberay-operator"}
            assert admits(policy, 8265, operator, "fill-in") and not admits(policy, 8265, operator, "another")
        prometheus = {"app.kubernetes.io/name": "prometheus"}
        assert admits(policy, 8080, prometheus, "fill-in") and not admits(policy, 8080, prometheus, "another")
        assert not admits(policy, 8265, {"batch.kubernetes.io/job-name": "any"}), "any job reaches the dashboard"
    submitter = OF_RAY["RayJob"]["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    assert admits(clusters, 8265, submitter) and not admits(clusters, 6379, submitter)
    assert policies["ray-distill-submitter"]["podSelector"]["matchLabels"] == submitter
    caller = {"ray-distill.io/calls": "features"}
    assert admits(service, 8000, caller) and admits(service, 8000, caller, "fill-in")
    assert not admits(service, 8000, caller, "another") and not admits(clusters, 8000, caller)
    assert not any(
        rule.get("ports") and not rule.get("to") and rule["ports"][0]["port"] != 53 for rule in service["egress"]
    )


def test_kustomize_gives_every_container_its_digest(tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl")
    folder = shutil.copytree(FOLDER, tmp_path / "kuberay")
    file = folder / "kustomization.yaml"
    file.write_text(file.read_text().replace("  # - ray", "  - ray").replace("fill-in", "mine", 1))
    built = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    kinds = [document["kind"] for document in yaml.safe_load_all(built.stdout)]
    assert sorted(kinds) == sorted(document["kind"] for document in DOCUMENTS)
    images = re.findall(r" image: (\S+)", built.stdout)
    assert len(images) == 9 and set(images) == {"mine/ray-distill@fill-in", "fill-in/ray-distill@fill-in"}


def test_another_port_of_the_store_is_one_line() -> None:
    text = (FOLDER / "network.yaml").read_text()
    opened = text.replace("    # - ports:", "    - ports:")
    before, policy = (next(yaml.safe_load_all(version)) for version in (text, opened))
    kubernetes_validate.validate(policy, KUBERNETES, strict=True)
    assert len(policy["spec"]["egress"]) == len(before["spec"]["egress"]) + 1
    endpoint = re.search(r"# AWS_ENDPOINT_URL: http://\S+:(\d+)$", (FOLDER / "storage.yaml").read_text(), re.MULTILINE)
    assert endpoint and {"port": int(endpoint[1])} in policy["spec"]["egress"][-1]["ports"]


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_a_drain_leaves_each_clusters_head_alone(kind: str) -> None:
    """Each cluster has its own budget, since a budget for several heads would protect only one of them.

    Only an integer ``minAvailable`` works: the other forms need a scale sub-resource, which KubeRay's resources lack.
    """
    name = OF_RAY[kind]["metadata"]["name"]
    documents = list(yaml.safe_load_all((FOLDER / f"{kind.lower()}.yaml").read_text()))
    budgets = {d["metadata"]["name"]: d for d in documents if d["kind"] == "PodDisruptionBudget"}
    budget = budgets[f"{name}-head"]
    own = {"app.kubernetes.io/instance": name}
    # The label of the node type is KubeRay's. The names of the clusters of a RayJob and a RayService are not known in advance.
    assert budget["spec"] == {"minAvailable": 1, "selector": {"matchLabels": own | {"ray.io/node-type": "head"}}}
    for template in pod_specs(kind).values():
        assert own.items() <= template["metadata"]["labels"].items()
    assert len(budgets) == (2 if kind == "RayService" else 1)


def test_versions_are_those_that_are_pinned() -> None:
    for kind in OF_RAY:
        pins = (FOLDER.parents[1] / "requirements.txt").read_text()
        assert f"\nray=={cluster_of(kind)['rayVersion']}\n" in pins, kind
