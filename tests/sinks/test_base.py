"""What every sink refuses before a run starts, and the id that a run keeps with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlalign.cli import main
from rlalign.core.registry import UserError, build
from rlalign.learning.log import check_sinks
from rlalign.sinks.base import Origin, Sink
from tests.config.test_config import least, refused


class Absent(Sink):
    """A sink whose package nobody has. Source: a test's own."""

    package = "no_such_package_of_a_sink"


def test_a_missing_package_is_told_before_the_run_has_a_folder(tmp_path, capsys):
    sink = f"{Absent.__module__}:Absent"
    said = (
        f"log.0.name: {sink} needs the package no_such_package_of_a_sink, which is not installed;"
        " pip install 'rlalign[no_such_package_of_a_sink]', or leave it out"
    )
    with pytest.raises(UserError) as caught:
        check_sinks([build("sinks", {"name": sink})])
    assert str(caught.value) == said
    out = tmp_path / "run"
    arguments = ["train", "configs/quickstart.yaml", f"log=[{{name: '{sink}'}}]", "--local"]
    assert main([*arguments, "--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_the_default_is_tensorboard_and_none_is_allowed():
    assert [sink.name for sink in least().log] == ["tensorboard"]
    assert least("log=[]").log == ()


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("{name: wandb}", "log must be a list of sinks such as [{name: tensorboard}], got "),
        (
            "[{name: wandbb}]",
            "log.0.name: no plug-in 'wandbb' on shelf sinks; did you mean 'wandb'",
        ),
        ("[{name: wandb, api_key: hush}]", "log.0.api_key: unknown setting; known: "),
        ("[{name: wandb, mode: dry}]", "log.0.mode must be 'online' or 'offline', got 'dry'"),
        (
            "[{name: mlflow, tracking_uri: 'sqlite:///mlflow.db'}]",
            "log.0.tracking_uri must name an absolute file, as sqlite:////data/mlflow.db does",
        ),
    ],
)
def test_a_wrong_log_is_refused(log, said):
    found = refused(f"log={log}")
    assert found.startswith(said)
    assert "hush" not in found


def test_a_password_in_an_address_is_refused_without_being_shown():
    found = refused("log=[{name: mlflow, tracking_uri: 'https://me:hush-hush@host/'}]")
    assert "must hold no password" in found
    assert "MLFLOW_TRACKING_PASSWORD" in found
    assert "hush" not in found


def test_an_id_is_kept_for_a_run_that_goes_on(tmp_path):
    origin = Origin(folder=tmp_path, name="trial", settings={}, resume_at=-1)
    made = iter("abc")
    assert origin.kept_id("wandb", lambda: next(made)) == ("a", True)
    assert origin.kept_id("mlflow", lambda: next(made)) == ("b", True)
    assert origin.kept_id("wandb", lambda: next(made)) == ("a", False)


@pytest.mark.promise
def test_sinks_are_imported_only_where_they_are_asked_for():
    code = (
        "import sys\nfrom rlalign.config import load_run\nload_run('configs/quickstart.yaml')\n"
        "print(sorted({'wandb', 'mlflow', 'tensorboard'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
