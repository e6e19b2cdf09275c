"""The deployment files: Ray's own validators where there are some, and what must hold in each of
them."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
ROLES = ("rollout", "reward", "learner")
HEALTH = ("initial_delay_ms", "period_ms", "timeout_ms", "failure_threshold")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def ray_version() -> str:
    (version,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version


def documents(name: str) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all((CLUSTER / name).read_text()) if d]


def ray_clusters() -> dict[str, dict[str, Any]]:
    """The spec of the standing cluster and of the job's."""
    return {
        "raycluster": documents("kuberay/raycluster.yaml")[0]["spec"],
        "rayjob": documents("kuberay/rayjob.yaml")[0]["spec"]["rayClusterSpec"],
    }


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def health_settings() -> dict[str, dict[str, int]]:
    """File -> the health settings that its head is started with."""
    text = (CLUSTER / "ray-env.sh").read_text()
    found = {
        "ray-env.sh": dict(
            re.findall(r"^export RAY_health_check_(\w+)=\$\{\w+:-(\d+)\}", text, re.MULTILINE)
        )
    }
    options = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())["docker"]["head_run_options"]
    found["ray-up.yaml"] = dict(re.findall(r"RAY_health_check_(\w+)=(\d+)", " ".join(options)))
    for name, spec in ray_clusters().items():
        env = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
        found[name] = {
            e["name"].removeprefix("RAY_health_check_"): e["value"]
            for e in env
            if "health_check" in e["name"]
        }
    return {name: {k: int(v) for k, v in values.items()} for name, values in found.items()}


def test_a_lost_node_is_noticed_within_five_seconds_by_every_head() -> None:
    for name, values in health_settings().items():
        assert set(values) == set(HEALTH), name
        worst = values["failure_threshold"] * (values["period_ms"] + values["timeout_ms"])
        assert worst <= 5000, f"{name}: {worst} ms"


def test_ray_knows_the_health_settings() -> None:
    import ray

    server = (Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server").read_bytes()
    for name in HEALTH:
        assert f"RAY_health_check_{name}".encode() in server, name


# --- ray up --------------------------------------------------------------------------------------


def validate(config: dict[str, Any]) -> dict[str, Any]:
    """Ray's own check, with the defaults that `ray up` adds."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.fixture
def ray_up() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())


def test_ray_up_is_valid(ray_up: dict[str, Any]) -> None:
    prepared = validate(ray_up)
    kinds = prepared["available_node_types"]
    assert set(kinds) == {"head", *ROLES}
    assert kinds["head"]["resources"]["CPU"] == 0
    for role in ROLES:
        assert kinds[role]["resources"][role] >= 1
        assert 0 <= kinds[role]["min_workers"] < kinds[role]["max_workers"]
        assert kinds[role]["docker"]["worker_image"].endswith(f"/rlalign:{VERSION}-gpu")
    assert sum(kinds[role]["max_workers"] for role in ROLES) == prepared["max_workers"]
    assert prepared["docker"]["image"].endswith(f"/rlalign:{VERSION}-cpu")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.update(idle_timeout_minute=3),
        lambda c: c.update(head_node_type="boss"),
        lambda c: c["available_node_types"]["rollout"].update(max_worker=3),
        lambda c: c["available_node_types"]["reward"]["resources"].update(reward="four"),
        lambda c: c["docker"].update(images="x"),
    ],
    ids=["key", "head type", "group's key", "type of a resource", "docker key"],
)
def test_ray_up_validation_catches_mistakes(ray_up: dict[str, Any], spoil) -> None:
    spoil(ray_up)
    with pytest.raises(Exception, match=r"(?i)not allowed|head_node_type|not of type"):
        validate(ray_up)


def test_ray_up_is_closed_to_strangers(ray_up: dict[str, Any]) -> None:
    options = " ".join(ray_up["docker"]["run_options"])
    (token,) = re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)", options)
    assert "--env RAY_AUTH_MODE=token" in options
    assert token in ray_up["file_mounts"]
    assert "--publish" not in options and "--privileged" not in options
    start = " ".join(ray_up["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    # The group that Ray makes where one is left out admits SSH from everywhere.
    for name, kind in ray_up["available_node_types"].items():
        assert kind["node_config"]["SecurityGroupIds"], name
    assert "/shared:/shared" in options
    assert any("/shared/runs" in command for command in ray_up["initialization_commands"])


# --- Kubernetes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kuberay_clusters_as_rays_autoscaler_reads_them(name: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    spec = ray_clusters()[name]
    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "rlalign", "namespace": "default"}, "spec": spec}
    )
    kinds = config["available_node_types"]
    assert set(kinds) == {"headgroup", *ROLES}
    assert kinds["headgroup"]["resources"]["CPU"] == 0
    for role in ROLES:
        assert kinds[role]["resources"][role] >= 1 and kinds[role]["resources"]["GPU"] >= 1
        assert 0 <= kinds[role]["min_workers"] < kinds[role]["max_workers"]
    assert config["idle_timeout_minutes"] >= 1
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kuberay_pods(name: str) -> None:
    spec = ray_clusters()[name]
    assert spec["rayVersion"] == ray_version()
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "enableIngress" not in spec["headGroupSpec"]
    claims = {
        d["metadata"]["name"]
        for d in documents("kuberay/shared.yaml")
        if d["kind"] == "PersistentVolumeClaim"
    }
    for group in groups(spec):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        kind = "gpu" if "groupName" in group else "cpu"
        assert container["image"].endswith(f"/rlalign:{VERSION}-{kind}")
        assert container["resources"]["requests"] == container["resources"]["limits"]
        volumes = {v["name"]: v for v in pod["volumes"]}
        mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
        assert set(volumes) == set(mounts)
        assert mounts["runs"] == "/shared/runs"
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] in claims
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not any("hostPath" in v for v in volumes.values())
        assert_unprivileged(pod)


def assert_unprivileged(pod: dict[str, Any]) -> None:
    """What Kubernetes' "restricted" standard asks for."""
    assert (
        pod["securityContext"]["runAsNonRoot"] is True
        and pod["securityContext"]["runAsUser"] == 1000
    )
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


def test_the_standing_clusters_dashboard_is_on_loopback() -> None:
    assert (
        ray_clusters()["raycluster"]["headGroupSpec"]["rayStartParams"]["dashboard-host"]
        == "127.0.0.1"
    )


def test_the_jobs_cluster_is_the_standing_one() -> None:
    standing, job = (copy.deepcopy(ray_clusters()[name]) for name in ("raycluster", "rayjob"))
    for spec in (standing, job):  # the two differences that rayjob.yaml speaks of
        spec["headGroupSpec"]["rayStartParams"].pop("dashboard-host")
        pod = spec["headGroupSpec"]["template"]["spec"]
        pod["volumes"] = [v for v in pod["volumes"] if v["name"] != "config"]
        pod["containers"][0]["volumeMounts"] = [
            m for m in pod["containers"][0]["volumeMounts"] if m["name"] != "config"
        ]
    assert job == standing


def test_the_job_runs_a_command_that_exists() -> None:
    from typer.testing import CliRunner

    from rlalign.cli.app import app

    spec = documents("kuberay/rayjob.yaml")[0]["spec"]
    program, command, config, *options = spec["entrypoint"].split()
    assert (program, command) == ("rlalign", "train")
    mounts = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0][
        "volumeMounts"
    ]
    assert str(Path(config).parent) in {m["mountPath"] for m in mounts}
    named = {o for o in options if o.startswith("--")}
    told = CliRunner().invoke(app, [command, "--help"]).output
    assert named and all(option in told for option in named)
    assert_unprivileged(spec["submitterPodTemplate"]["spec"])


def test_the_page_beside_the_cluster_owns_its_store_alone() -> None:
    from typer.testing import CliRunner

    from rlalign.cli.app import app
    from rlalign.voting.settings import parse_vote

    config, claim, deployment, service, policy = documents("kuberay/vote.yaml")
    vote = parse_vote(yaml.safe_load(config["data"]["vote.yaml"]))
    assert vote.source.kind == "policy", "what --address is for"
    assert vote.server.with_token and vote.server.origin.startswith("https://")
    assert vote.runtime.rollout.resources.keys() <= set(ROLES)

    # one at a time, with a disk of its own below the store, and nobody's rights
    assert (deployment["spec"]["replicas"], deployment["spec"]["strategy"]) == (
        1,
        {"type": "Recreate"},
    )
    template = deployment["spec"]["template"]
    pod = template["spec"]
    (container,) = pod["containers"]
    assert_unprivileged(pod)
    assert container["image"].endswith(f"/rlalign:{VERSION}-cpu")
    assert container["resources"]["requests"] == container["resources"]["limits"]
    volumes = {v["name"]: v for v in pod["volumes"]}
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert set(volumes) == set(mounts)
    assert vote.place.startswith(mounts["votes"] + "/")
    assert volumes["votes"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]

    # it joins as a node that offers nothing, by the operator's token, and serves the page
    start, serve = container["args"][0].splitlines()
    assert "--num-cpus 0" in start and "--address rlalign-head-svc:6379" in start
    program, command, file, *options = serve.removeprefix("exec ").split()
    assert (program, command) == ("rlalign", "vote")
    assert file == f"{mounts['config']}/vote.yaml"
    told = CliRunner().invoke(app, [command, "--help"]).output
    assert all(option in told for option in options if option.startswith("--"))
    env = {one["name"]: one for one in container["env"]}
    assert env["RAY_AUTH_MODE"]["value"] == "token"
    assert env["RAY_AUTH_TOKEN_PATH"]["value"].startswith(mounts["token"])
    assert "secretKeyRef" in env[vote.server.admin_token_env]["valueFrom"]

    # who may reach it, and who reads its metrics
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert ports == {"page": vote.server.port, "metrics": 8080}
    labels = template["metadata"]["labels"]
    for chosen in (service["spec"]["selector"], policy["spec"]["podSelector"]["matchLabels"]):
        assert chosen.items() <= labels.items()
    assert labels["app.kubernetes.io/name"] == "rlalign", "shared.yaml's policy, and the monitor"
    assert service["spec"]["type"] == "ClusterIP"
    (rule,) = policy["spec"]["ingress"]
    assert rule["from"] and rule["ports"] == [{"port": vote.server.port}]


def test_the_network_policy_is_about_these_pods_and_ports() -> None:
    (policy,) = (d for d in documents("kuberay/shared.yaml") if d["kind"] == "NetworkPolicy")
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    heads = [spec["headGroupSpec"]["template"] for spec in ray_clusters().values()]
    for template in (g["template"] for spec in ray_clusters().values() for g in groups(spec)):
        assert chosen.items() <= template["metadata"]["labels"].items()
    ports = {p["port"] for rule in policy["spec"]["ingress"] for p in rule.get("ports", ())}
    for head in heads:
        assert ports <= {p["containerPort"] for p in head["spec"]["containers"][0]["ports"]}
    assert all(rule.get("from") for rule in policy["spec"]["ingress"]), (
        "a rule without 'from' admits everyone"
    )
    submitter = documents("kuberay/rayjob.yaml")[0]["spec"]["submitterPodTemplate"]["metadata"][
        "labels"
    ]
    assert {"podSelector": {"matchLabels": submitter}} in [
        source for rule in policy["spec"]["ingress"] for source in rule["from"]
    ]


def test_the_pod_monitor_finds_the_pods_and_their_ports() -> None:
    (monitor,) = documents("prometheus/podmonitor.yaml")
    chosen = monitor["spec"]["selector"]["matchLabels"]
    endpoints = {e["port"] for e in monitor["spec"]["podMetricsEndpoints"]}
    for spec in ray_clusters().values():
        for number, group in enumerate(groups(spec)):
            assert chosen.items() <= group["template"]["metadata"]["labels"].items()
            ports = {p["name"] for p in group["template"]["spec"]["containers"][0]["ports"]}
            assert endpoints <= ports if number == 0 else "metrics" in ports & endpoints


def test_no_file_names_a_secret() -> None:
    """A token is a file's path or a Kubernetes Secret; its value stands nowhere."""
    files = [f for folder in (CLUSTER, ROOT / "docker") for f in folder.rglob("*") if f.is_file()]
    assert len(files) >= 10
    for file in files:
        text = file.read_text()
        assert not re.search(r"RAY_AUTH_TOKEN=\S", text), file
        assert not re.search(
            r"(?i)(password|secret_?key|api_?key)\s*[:=]\s*['\"]?[A-Za-z0-9]", text
        ), file
    assert json.dumps(documents("kuberay/shared.yaml")).count('"kind": "Secret"') == 0
