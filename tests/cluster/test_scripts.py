"""The start scripts and the Slurm script, run for real on a private network: who may come in, and
that a node lost is seen."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import private_network
from tests.cluster.private_network import HEAD, Network, environment, wait_for
from tests.runs import SMALL

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
DASHBOARD = "http://127.0.0.1:8265"
WORKER = "10.77.0.2"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(bool(private_network.missing()), reason=private_network.missing()),
]


@pytest.fixture
def network() -> Iterator[Network]:
    with private_network.private_network() as inside:
        yield inside


@pytest.fixture
def home() -> Iterator[Path]:
    """A home folder with a short path: Ray's sockets allow no long one."""
    folder = Path(tempfile.mkdtemp(prefix="rlalign-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def nodes(network: Network, token: str) -> dict[str, str]:
    """Address -> state, as the dashboard says."""
    try:
        summary = json.loads(network.text_of(f"{DASHBOARD}/nodes?view=summary", token))["data"][
            "summary"
        ]
    except (ValueError, KeyError):
        return {}
    return {node["ip"]: node["raylet"].get("state", "") for node in summary}


def listening(network: Network) -> dict[int, set[str]]:
    """Port -> addresses that something inside listens on."""
    found: dict[int, set[str]] = {}
    for line in network.run("ss", "-ltnH").stdout.splitlines():
        address, _, port = line.split()[3].rpartition(":")
        found.setdefault(int(port), set()).add(address)
    return found


def assert_secret(token: str, network: Network, *folders: Path, besides: Path) -> None:
    """The token is in no process's arguments, and in no file but its own."""
    assert token not in network.command_lines()
    logs = network.run("grep", "-rlFf", str(besides), "/tmp/ray", *map(str, folders)).stdout.split()
    assert set(logs) <= {str(besides)}


def test_a_cluster_by_hand(network: Network, home: Path) -> None:
    env = environment(HOME=str(home))
    log, token_file = home / "head.log", home / ".ray" / "auth_token"
    start = CLUSTER / "start-head.sh"
    network.start(str(start), "--node-ip", HEAD, "--", "--block", log=log, env=env)
    wait_for("the dashboard", lambda: network.status_of(f"{DASHBOARD}/api/version") > 0, log)
    token = token_file.read_text()
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600

    worker_log, where = home / "worker.log", f"{HEAD}:6379"
    join = [
        str(CLUSTER / "start-worker.sh"),
        "--head",
        where,
        "--node-ip",
        WORKER,
        "--role",
        "rollout",
        "--places",
        "3",
    ]
    network.start(
        *join, "--cpus", "2", "--metrics-port", "8081", "--", "--block", log=worker_log, env=env
    )
    wait_for(
        "the worker", lambda: nodes(network, token) == {HEAD: "ALIVE", WORKER: "ALIVE"}, worker_log
    )

    for path in ("/api/jobs/", "/api/cluster_status", "/nodes?view=summary", "/api/v0/actors"):
        assert network.status_of(DASHBOARD + path) == 401, path
        assert network.status_of(DASHBOARD + path, "0" * 64) in (401, 403), path
        assert network.status_of(DASHBOARD + path, token) == 200, path
    assert listening(network)[8265] == {"127.0.0.1"}
    held = env | {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": where}
    stranger = held | {"HOME": "/nonexistent", "RAY_AUTH_TOKEN": "0" * 64}

    def shows_both() -> bool:
        shown = network.run("ray", "status", env=held).stdout
        return "0.0/3.0 rollout" in shown and "0.0/2.0 CPU" in shown

    wait_for("the worker's places in `ray status`", shows_both)
    assert network.run("ray", "status", env=stranger).returncode != 0
    assert_secret(token, network, home, besides=token_file)

    raylets = network.run(
        "pgrep", "-f", f"raylet/raylet .*--node_ip_address={WORKER}"
    ).stdout.split()
    assert len(raylets) == 1
    network.run("kill", "-KILL", *raylets)
    wait_for("the loss of the worker", lambda: nodes(network, token).get(WORKER) == "DEAD", log)
    assert nodes(network, token)[HEAD] == "ALIVE"


def test_a_head_on_loopback_listens_on_nothing_else(network: Network, home: Path) -> None:
    env, log = environment(HOME=str(home)), home / "head.log"
    places = json.dumps({"rollout": 2, "reward": 2, "learner": 1})
    network.start(
        str(CLUSTER / "start-head.sh"),
        "--cpus",
        "6",
        "--resources",
        places,
        "--",
        "--block",
        log=log,
        env=env,
    )
    wait_for("the dashboard", lambda: network.status_of(f"{DASHBOARD}/api/version") > 0, log)
    token = (home / ".ray" / "auth_token").read_text()
    wait_for("the node", lambda: nodes(network, token) == {"127.0.0.1": "ALIVE"}, log)
    wait_for("the metrics", lambda: 8080 in listening(network), log)
    loopback = {"127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"}
    found = listening(network)
    assert {6379, 8265, 8080} <= set(found)
    assert not {port: where for port, where in found.items() if where - loopback}


def shims(folder: Path) -> Path:
    """`srun` and `scontrol` of a made-up Slurm whose nodes n1, n2, n3 are this machine: a step just
    runs."""
    folder.mkdir()
    (folder / "scontrol").write_text("#!/usr/bin/env bash\nprintf '%s\\n' n1 n2 n3\n")
    (folder / "srun").write_text(
        "#!/usr/bin/env bash\n"
        'echo "srun $*" >> "$SHIM_LOG"\n'
        "while [[ $1 == -* ]]; do [[ $1 == --nodelist=n* ]] && number=${1#--nodelist=n}; shift;"
        " done\n"
        "program=$1; shift\n"
        # a node has its own /tmp
        "exec unshare --mount bash -c 'mount -t tmpfs none /tmp/ray && exec \"$@\"' _ "
        '"$program" --node-ip "10.77.0.$number" --metrics-port "808$number" "$@"\n'
    )
    for file in folder.iterdir():
        file.chmod(0o755)
    return folder


def slurm(
    network: Network, home: Path, run: Path, *settings: str
) -> subprocess.CompletedProcess[str]:
    env = environment(
        HOME=str(home),
        SLURM_JOB_ID="77",
        SLURM_JOB_NODELIST="n[1-3]",
        SLURM_SUBMIT_DIR=str(ROOT),
        RLALIGN_HEAD_IP=HEAD,
        RLALIGN_PLACES="2",
        RLALIGN_JOIN_SECONDS="90",
        SHIM_LOG=str(home / "srun.log"),
        OMP_NUM_THREADS="1",
    )
    env["PATH"] = f"{home / 'bin'}:{env['PATH']}"
    spooled = home / "slurm_script"  # Slurm runs a copy that lies elsewhere
    shutil.copy(CLUSTER / "slurm.sbatch", spooled)
    return network.run(
        "bash",
        str(spooled),
        str(ROOT / "configs" / "quickstart.yaml"),
        str(run),
        *settings,
        env=env,
    )


@pytest.mark.timeout(1200)
def test_a_slurm_job_and_the_same_line_again(network: Network, home: Path) -> None:
    shims(home / "bin")
    run = home / "run"
    roles = [f"runtime.{role}.resources={{{role}: 1}}" for role in ("rollout", "reward", "learner")]
    settings = [*SMALL, "rounds=2", *roles]
    done = slurm(network, home, run, *settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (run / "report.html").is_file()
    steps = (home / "srun.log").read_text()
    assert "--nodelist=n2" in steps and "--nodelist=n3" in steps and "--nodelist=n1" not in steps
    assert "--role reward" in steps and "--role rollout" in steps
    assert not list((home / ".rlalign").iterdir()), "the job's token is gone"
    assert "raylet" not in network.command_lines()

    again = slurm(network, home, run)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
