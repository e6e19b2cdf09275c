"""MLflow on a SQLite file: what it holds of a run; a server that is down ends nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlalign.core.registry import UserError, build
from tests.sinks.logged import files_with, log_rounds

PASSWORD = "hush-hush-0123456789"


@pytest.mark.promise
def test_a_database_holds_metrics_pictures_settings_and_the_report(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    sink = {"name": "mlflow", "tracking_uri": uri, "experiment": "trials"}
    first = log_rounds(tmp_path / "run", sink, MLFLOW_TRACKING_PASSWORD=PASSWORD)
    assert first.told == []

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("trials")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "reward/total/mean")
    assert [(one.step, one.value) for one in history] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert "missing" not in run.data.metrics
    assert run.data.params == {
        "name": "trial",
        "plan.steps": "10",
        "rewards.0.name": "shapes",
        "rewards.0.weight": "1.0",
    }
    assert (run.info.run_name, run.info.status) == ("trial", "FINISHED")
    kept = {one.path for one in client.list_artifacts(run.info.run_id)}
    assert kept == {"config.yaml", "report.html", "samples"}
    pictures = {one.path for one in client.list_artifacts(run.info.run_id, "samples")}
    assert pictures == {
        "samples/round-00003.png",
        "samples/round-00003-changes.png",
        "samples/round-00004.png",
        "samples/round-00004",
    }
    clips = client.list_artifacts(run.info.run_id, "samples/round-00004")
    assert [Path(one.path).name for one in clips] == ["000.webp", "001.webp"]
    assert (tmp_path / "mlartifacts").is_dir(), "beside the database"
    assert files_with([PASSWORD], tmp_path) == []
    assert not any(PASSWORD in command for command in first.arguments)

    # a run that goes on is the same one
    assert log_rounds(tmp_path / "run", sink, resume_at=2).told == []
    assert len(client.search_runs([experiment.experiment_id])) == 1


@pytest.mark.promise
def test_a_server_that_is_down_ends_nothing(tmp_path):
    found = log_rounds(
        tmp_path / "run",
        {"name": "mlflow", "tracking_uri": "http://127.0.0.1:9"},  # where nobody listens
        MLFLOW_TRACKING_USERNAME="me",
        MLFLOW_TRACKING_PASSWORD=PASSWORD,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    )
    failed, left_out = found.told
    assert failed.startswith("log: mlflow failed (MlflowException: API request to ")
    assert left_out == "log: mlflow failed 3 times in a row and is left out"
    assert PASSWORD not in found.said
    assert files_with([PASSWORD], tmp_path) == []
    assert not any(PASSWORD in command for command in found.arguments)


def test_an_address_is_needed(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(UserError, match=r"log\.1\.tracking_uri is required where MLFLOW_TRACKING"):
        build("sinks", {"name": "mlflow"}).check("log.1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    build("sinks", {"name": "mlflow"}).check("log.1")
