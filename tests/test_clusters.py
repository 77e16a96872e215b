"""What users start clusters with: each file against its own schema, linter or
list of required fields. None of it was started here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import REPOSITORY
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from kr_ray.cluster.telemetry import COUNTERS, GAUGES, STAGE_GAUGE, TAGS
from kr_ray.config.file import load_config

DOCKER = REPOSITORY / "docker"
CLUSTERS = REPOSITORY / "configs" / "clusters"
UPS = sorted(CLUSTERS.glob("*.yaml"))
CAPABILITIES = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def manifests() -> list[dict[str, Any]]:
    return [
        document
        for path in (DOCKER / "kuberay").glob("*.yaml")
        for document in yaml.safe_load_all(path.read_text())
    ]


def of_kind(kind: str) -> dict[str, Any]:
    [found] = [manifest for manifest in manifests() if manifest["kind"] == kind]
    return found


# --- image and compose --------------------------------------------------------------------------------------


def test_the_dockerfile_passes_hadolint() -> None:
    path = Path(sys.executable).with_name("hadolint")
    if not path.exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run([path, str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_is_pinned_locked_and_unprivileged() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("USER")][-1] == "1000:100"
    bases = re.findall(
        r"rayproject/ray:[\w.-]+",
        "".join(path.read_text() for path in DOCKER.glob("*ompose*.yaml")) + "\n".join(lines),
    )
    assert set(bases) == {"rayproject/ray:2.60.0-py312-gpu", "rayproject/ray:2.60.0-py312-cpu"}
    copied = {part for line in lines if line.startswith("COPY") for part in line.split()[2:-1]}
    assert all((REPOSITORY / part).exists() for part in copied)
    admitted = {
        line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert all(any(part == name or part.startswith(f"{name}/") for name in admitted) for part in copied)


def test_the_constraints_lock_every_dependency_and_name_no_host() -> None:
    lines = [
        line for line in (DOCKER / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    ]
    locked = dict(re.fullmatch(r"([a-z0-9.-]+)==([\w.]+)", line).groups() for line in lines)  # type: ignore[union-attr]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["mlflow"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[requirement.name.lower()]), text
    assert load(DOCKER / "kuberay" / "raycluster.yaml")["spec"]["rayVersion"] == locked["ray"]


def compose_schema() -> Any:
    pytest.importorskip(
        "check_jsonschema", reason="check-jsonschema, which ships the compose schema, is not installed"
    )
    return json.loads(
        (files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text()
    )


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_fit_the_compose_specification(name: str) -> None:
    jsonschema.validate(load(DOCKER / name), compose_schema())


def test_compose_publishes_on_loopback_only_and_asks_for_the_token() -> None:
    services = load(DOCKER / "compose.yaml")["services"]
    assert set(services) == {"head", "worker", "prometheus", "grafana"}
    assert services["worker"]["deploy"]["replicas"] == 2
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and "mem_limit" in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
    for name in ("head", "worker"):
        environment = services[name]["environment"]
        assert (
            environment["RAY_AUTH_MODE"] == "token"
            and environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        ), name
        assert services[name]["secrets"] == ["ray_token"]
    assert "/docker/token" in (REPOSITORY / ".gitignore").read_text().splitlines()


def test_compose_prometheus_and_grafana_meet_each_other() -> None:
    compose = load(DOCKER / "compose.yaml")["services"]
    [scraped] = load(DOCKER / "prometheus.yaml")["scrape_configs"]
    [discovery] = scraped["dns_sd_configs"]
    assert set(discovery["names"]) <= set(compose)
    for name in discovery["names"]:
        assert f"--metrics-export-port={discovery['port']}" in compose[name]["command"]
    [source] = load(DOCKER / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == compose["head"]["environment"]["RAY_PROMETHEUS_HOST"] == "http://prometheus:9090"
    paths = [
        p["options"]["path"]
        for p in load(DOCKER / "grafana" / "provisioning" / "dashboards" / "dashboards.yaml")["providers"]
    ]
    assert (
        "./grafana/dashboards:/etc/grafana/kr_ray:ro" in compose["grafana"]["volumes"]
        and "/etc/grafana/kr_ray" in paths
    )


def test_the_grafana_dashboard_asks_for_exactly_the_metrics_that_are_exported() -> None:
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "kr_ray.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = set(re.findall(r"ray_kr_\w+", " ".join(queries)))
    # Prometheus' convention, which Ray follows: a counter's name ends in `_total`.
    assert asked == {f"ray_{name}" for name in [*GAUGES, STAGE_GAUGE]} | {
        f"ray_{name}_total" for name in COUNTERS
    }
    labels = {label for query in queries for label in re.findall(r"(\w+)=~", query)}
    assert labels <= set(TAGS)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]  # Grafana's grid


# --- KubeRay ------------------------------------------------------------------------------------------------

RAY_CLUSTER_KEYS = {
    "rayVersion", "authOptions", "gcsFaultToleranceOptions", "enableInTreeAutoscaling", "autoscalerOptions",
    "headGroupSpec", "workerGroupSpecs",
}  # fmt: skip
WORKER_GROUP_KEYS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
RAY_JOB_KEYS = {
    "entrypoint", "submissionMode", "submitterPodTemplate", "backoffLimit", "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "rayClusterSpec",
}  # fmt: skip


def check_pod(pod: dict[str, Any]) -> None:
    security = pod["securityContext"]
    assert (
        security["runAsNonRoot"]
        and security["runAsUser"] > 0
        and security["seccompProfile"] == {"type": "RuntimeDefault"}
    )
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert container["name"] and container["image"]
        assert container["securityContext"] == CAPABILITIES
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys() & container["resources"][
            "limits"
        ].keys()
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def check_ray_cluster(spec: dict[str, Any]) -> None:
    """The fields of KubeRay's custom resource (ray.io/v1) that a cluster
    of ours needs; and none that it does not know."""
    assert spec.keys() == RAY_CLUSTER_KEYS
    assert spec["authOptions"] == {"mode": "token"}
    fault_tolerance = spec["gcsFaultToleranceOptions"]
    assert fault_tolerance["redisAddress"] == "redis:6379"
    assert fault_tolerance["redisPassword"]["valueFrom"]["secretKeyRef"] == {
        "name": "kr-ray-redis",
        "key": "password",
    }
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["autoscalerOptions"]["securityContext"] == CAPABILITIES
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0" and head["serviceType"] == "ClusterIP"
    assert all(isinstance(value, str) for value in head["rayStartParams"].values())
    for group in [head, *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        check_pod(pod)
        assert pod["restartPolicy"] == "Never"
        claims = [
            volume["persistentVolumeClaim"]["claimName"]
            for volume in pod["volumes"]
            if "persistentVolumeClaim" in volume
        ]
        assert claims == ["kr-ray-shared"]
    for group in spec["workerGroupSpecs"]:
        assert group.keys() == WORKER_GROUP_KEYS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        [container] = group["template"]["spec"]["containers"]
        assert (
            container["resources"]["limits"]["nvidia.com/gpu"]
            == container["resources"]["requests"]["nvidia.com/gpu"]
            == 1
        )


def test_ray_cluster_manifest() -> None:
    cluster = of_kind("RayCluster")
    assert cluster["apiVersion"] == "ray.io/v1"
    check_ray_cluster(cluster["spec"])


def test_ray_job_manifest() -> None:
    job = of_kind("RayJob")
    spec = job["spec"]
    assert job["apiVersion"] == "ray.io/v1" and spec.keys() == RAY_JOB_KEYS
    assert spec["rayClusterSpec"] == of_kind("RayCluster")["spec"]
    assert (
        spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    )  # the TTL counts only with the shutdown
    check_pod(spec["submitterPodTemplate"]["spec"])
    program, config, *options = spec["entrypoint"].removeprefix("python ").split()
    assert all((REPOSITORY / path.removeprefix("/opt/kr_ray/")).is_file() for path in (program, config))
    cluster = load_config(REPOSITORY / config.removeprefix("/opt/kr_ray/"), options[1::2]).cluster
    limits = spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"][
        "limits"
    ]
    assert cluster.train.gpu <= limits["nvidia.com/gpu"] and cluster.train.cpu <= float(limits["cpu"])


def test_shared_manifests() -> None:
    claims = {
        m["metadata"]["name"]: m["spec"]["accessModes"]
        for m in manifests()
        if m["kind"] == "PersistentVolumeClaim"
    }
    assert claims == {"kr-ray-shared": ["ReadWriteMany"], "kr-ray-redis": ["ReadWriteOnce"]}
    deployment, service = of_kind("Deployment")["spec"], of_kind("Service")["spec"]
    assert (
        service["selector"]
        == deployment["selector"]["matchLabels"]
        == deployment["template"]["metadata"]["labels"]
    )
    check_pod(deployment["template"]["spec"])


# --- `ray up` and Slurm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", UPS, ids=lambda path: path.stem)
def test_ray_up_files_fit_rays_schema(path: Path) -> None:
    config = load(path)
    jsonschema.validate(config, json.loads((files("ray") / "autoscaler" / "ray-schema.json").read_text()))
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    [head] = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    [worker] = [command for command in config["worker_start_ray_commands"] if "ray start" in command]
    assert head.startswith("RAY_AUTH_MODE=token ray start --head") and worker.startswith(
        "RAY_AUTH_MODE=token ray start --address="
    )
    assert "--dashboard-host=127.0.0.1" in head and "0.0.0.0" not in path.read_text()


def test_there_is_a_file_for_every_kind_of_cluster() -> None:
    assert {path.stem for path in UPS} == {"aws", "gcp", "on_premise"}
    assert "--num-gpus=4" in (CLUSTERS / "on_premise.yaml").read_text()  # the paper's machine


def test_the_slurm_script_is_sound() -> None:
    script = CLUSTERS / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if shellcheck.exists():
        done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    assert "RAY_AUTH_MODE=token" in script.read_text() and "umask 077" in script.read_text()


def test_no_file_holds_a_secret() -> None:
    for path in [*DOCKER.rglob("*"), *CLUSTERS.iterdir()]:
        if path.is_file():
            assert not re.search(
                r"(?i)(password|token|secret)\s*[:=]\s*[\"']?[0-9a-f]{16,}", path.read_text()
            ), path
