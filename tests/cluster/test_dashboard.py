"""The Grafana dashboard and the Prometheus files: sound in themselves, and asked of a real
Prometheus that watches a real run."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from tests.runs import CONFIGS, SMALL

CLUSTER = Path(__file__).parents[2] / "cluster"
PROMETHEUS = os.environ.get("RLALIGN_PROMETHEUS") or shutil.which("prometheus")
DASHBOARD: dict[str, Any] = json.loads((CLUSTER / "grafana" / "rlalign.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
EXPRESSIONS = {
    f"{p['title']} {t['refId']}": t["expr"] for p in PANELS for t in p.get("targets", ())
}
OF_PEOPLE = ("Votes a minute", "Pairs ready and runs waiting", "Seconds of drawing")
"""Panels of a page where people choose, and of a run that waits for votes: tests/runtime has what
sends them."""
HISTOGRAM = ("_bucket", "_sum", "_count")

# A run's names that depend on its settings; the run below has them all. The dashboard names some by
# a pattern.
SETTINGS = (
    *SMALL,
    "rounds=12",
    "algorithm={name: grpo, kl_weight: 0.1, clip_range: 1.0e-3}",
    "evaluate.rewards=[{name: jpeg, label: size}]",
)


def names(expression: str) -> set[str]:
    """The metrics that an expression names in full."""
    return set(re.findall(r"\bray_\w+(?=[{\[)\s]|$)", re.sub(r'"[^"]*"', '""', expression)))


def patterns(expression: str) -> set[str]:
    """The patterns of metrics' names that an expression has."""
    return set(re.findall(r'__name__=~"([^"]+)"', expression))


def filled_in(expression: str) -> str:
    """With Grafana's variables replaced as Grafana does."""
    return expression.replace("$run", ".*").replace("$__rate_interval", "60s")


# --- the dashboard by itself ---------------------------------------------------------------------


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert len({p["id"] for p in PANELS}) == len(PANELS)
    assert len({p["title"] for p in PANELS}) == len(PANELS)
    taken: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        place = panel["gridPos"]
        assert (
            place["x"] >= 0 and place["x"] + place["w"] <= 24 and place["w"] > 0 and place["h"] > 0
        )
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken.get((x, y))}"
                taken[x, y] = panel["title"]


def test_panels_use_the_two_variables_and_say_what_they_show() -> None:
    assert DASHBOARD["schemaVersion"] >= 39 and DASHBOARD["uid"] == "rlalign"
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert {v: variables[v]["type"] for v in variables} == {
        "datasource": "datasource",
        "run": "query",
    }
    for panel in (p for p in PANELS if p["type"] != "row"):
        assert panel["description"].endswith(".")
        refs = [t["refId"] for t in panel["targets"]]
        assert refs and len(set(refs)) == len(refs)
        for thing in (panel, *panel["targets"]):
            assert thing["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for title, expression in EXPRESSIONS.items():
        assert ("rlalign" not in expression) or 'run=~"$run"' in expression, title
        assert set(re.findall(r"\$\w+", expression)) <= {"$run", "$__rate_interval"}, title


def test_the_dashboard_shows_what_an_operator_asks_for() -> None:
    shown = " ".join(EXPRESSIONS.values())
    for metric in (
        "reward_total_mean reward_total_std evaluation_held_out kl ratio_max_deviation"
        " ratio_clip_fraction grad_norm samples_total seconds_rollout seconds_reward seconds_update"
        " seconds_sync queue_depth staleness_max workers restarts_rollout restarts_reward"
        " unit_seconds_bucket reward_seconds_bucket reward_errors_total units_retried_total"
        " votes_total pairs_ready ballots_open votes_waiting drawing_seconds_bucket"
    ).split():
        assert f"ray_rlalign_{metric}" in shown, metric
    assert "ray_object_store_memory" in shown


class Recorded:
    """In the place of Ray's gauge, which needs a running Ray: notes its name."""

    names: ClassVar[set[str]] = set()

    def __init__(self, name: str, **_: Any) -> None:
        self.names.add(f"ray_{name}")

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert value == value and set(tags) == {"run"}


@pytest.mark.slow
def test_every_metric_of_ours_is_one_that_a_run_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counters, pools and histograms by their list; gauges by what the records of a real run
    become."""
    from rlalign.alignment.cursors import WAITING
    from rlalign.alignment.loop import train_local
    from rlalign.config import load_run
    from rlalign.runtime import gauges

    run = load_run(CONFIGS / "quickstart.yaml", [*SETTINGS, "rounds=2"])
    records: list[Any] = []
    train_local(run, tmp_path / "run", resume=False, on_record=records.append)
    monkeypatch.setattr("ray.util.metrics.Gauge", Recorded)
    sender = gauges.Gauges("a run")
    for record in records:
        sender.line(record)
    sent = Recorded.names | gauges.metric_names() | {f"ray_{gauges.gauge_name(WAITING)}"}
    sent |= {f"ray_{name}{end}" for name in gauges.HISTOGRAMS for end in HISTOGRAM}
    for title, expression in EXPRESSIONS.items():
        for name in names(expression):
            assert not name.startswith("ray_rlalign_") or name in sent, (
                f"{title}: no run sends {name}"
            )
        for pattern in patterns(expression):
            assert any(re.fullmatch(pattern, name) for name in sent), (
                f"{title}: no run sends {pattern}"
            )


def test_a_name_is_found_in_an_expression() -> None:
    assert names(
        'histogram_quantile(0.5, sum by (le) (rate(ray_a_bucket{run=~"ray_no"}[5m]))) + ray_b'
    ) == {
        "ray_a_bucket",
        "ray_b",
    }
    assert patterns('max by (run) ({__name__=~"ray_x_.+", run=~"$run"})') == {"ray_x_.+"}


def test_the_scrape_config_reads_rays_own_list() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    config = yaml.safe_load((CLUSTER / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


# --- a real Prometheus ---------------------------------------------------------------------------


class Prometheus:
    """A running server's HTTP interface."""

    def __init__(self, port: int) -> None:
        self.address = f"127.0.0.1:{port}"

    def ask(self, path: str, **query: str | float) -> Any:
        """The data that it answers; AssertionError with its words where it refuses."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as refusal:
            raise AssertionError(f"{query}: {refusal.read().decode()}") from refusal


@pytest.fixture
def short_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="rlalign-"))  # Ray's sockets allow no long path
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def prometheus(short_folder: Path) -> Iterator[Prometheus]:
    """The shipped configuration, but every second, and for the Ray whose files are in
    ``short_folder``."""
    if PROMETHEUS is None:
        pytest.skip(
            "needs Prometheus: on PATH, or named by RLALIGN_PROMETHEUS (Debian: apt-get install"
            " prometheus)"
        )
    text = (CLUSTER / "prometheus" / "prometheus.yml").read_text()
    config = short_folder / "prometheus.yml"
    config.write_text(text.replace("/tmp/ray/", f"{short_folder}/ray/").replace("10s", "1s"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = Prometheus(free.getsockname()[1])
    log = short_folder / "prometheus.log"
    command = [PROMETHEUS, f"--config.file={config}", f"--web.listen-address={server.address}"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, f"--storage.tsdb.path={short_folder}/data"], stdout=out, stderr=out
        )
    while True:
        try:
            urllib.request.urlopen(f"http://{server.address}/-/ready", timeout=5).close()
            break
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
    yield server
    process.terminate()
    process.wait()


FLAKY = '''
"""A reward that fails on its first call, which is what its errors' metrics are for."""
import os
import pathlib


def score(media, prompts):
    try:
        os.close(os.open(pathlib.Path(__file__).with_suffix(".once"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return [0.0] * len(prompts)
    raise RuntimeError("the first call fails")
'''


@pytest.mark.slow
@pytest.mark.ray
def test_prometheus_answers_every_panel_of_a_real_run(
    prometheus: Prometheus, short_folder: Path
) -> None:
    (short_folder / "flaky.py").write_text(FLAKY)
    rewards = "rewards=[{name: shapes}, {name: function, call: 'flaky:score', label: flaky}]"
    env = os.environ | {
        "RAY_TMPDIR": str(short_folder),
        "RAY_metrics_report_interval_ms": "1000",
        "PYTHONPATH": str(short_folder),
    }
    began = time.time()
    command = [
        sys.executable,
        "-m",
        "rlalign",
        "train",
        str(CONFIGS / "quickstart.yaml"),
        *SETTINGS,
        rewards,
    ]
    run = subprocess.run(
        [*command, "--out", str(short_folder / "run")],
        env=env,
        cwd=short_folder,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    missing = []
    for title, expression in EXPRESSIONS.items():
        if title.startswith(OF_PEOPLE):
            continue
        found = prometheus.ask(
            "query_range", query=filled_in(expression), start=began, end=time.time(), step=1
        )["result"]
        if not any(
            float(value) == float(value) for series in found for _, value in series["values"]
        ):
            missing.append(f"{title}: {expression}")
    assert not missing, "\n".join(missing)
    runs = prometheus.ask(
        "series", **{"match[]": "ray_rlalign_round", "start": began, "end": time.time()}
    )
    assert {series["run"] for series in runs} == {"quickstart"}
