"""MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from rlalign.core.pictures import clip_files, clips_folder
from rlalign.core.registry import UserError
from rlalign.sinks.base import Origin, Sink, Writer

_SQLITE = "sqlite:///"
_MOST_PARAMS = 100
_LONGEST_PARAM = 500


class MLflow(Sink):
    """A run of MLflow: metrics over rounds, the settings as parameters, and the evaluation's
    pictures and clips, config.yaml and the report as artefacts.

    A password is MLFLOW_TRACKING_PASSWORD's, a token MLFLOW_TRACKING_TOKEN's. A run that goes on is
    the same run there; rounds that it does again are logged again.

    Source: the package mlflow or mlflow-skinny (extra ``mlflow``).
    """

    package: ClassVar[str] = "mlflow"

    tracking_uri: str = Field(
        default="",
        description=(
            "a server (http://...) or a database (sqlite:////absolute/mlflow.db);"
            " MLFLOW_TRACKING_URI when empty"
        ),
    )
    experiment: str = Field(default="rlalign", min_length=1, description="MLflow's experiment")

    @field_validator("tracking_uri")
    @classmethod
    def _has_no_secret(cls, uri: str) -> str:
        if urlsplit(uri).password:
            # the message must not show it
            raise UserError(
                "log: tracking_uri of mlflow must hold no password, as it is written to"
                " config.yaml; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        if uri.startswith(_SQLITE) and not uri.startswith(f"{_SQLITE}/"):
            raise ValueError("must name an absolute file, as sqlite:////data/mlflow.db does")
        return uri

    def check(self, place: str) -> None:
        super().check(place)
        if not self._uri:
            raise UserError(
                f"{place}.tracking_uri is required where MLFLOW_TRACKING_URI is not set: a server"
                " (http://127.0.0.1:5000) or a file (sqlite:////data/mlflow.db)"
            )

    @property
    def _uri(self) -> str:
        return self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")

    def connect(self, origin: Origin) -> Writer:
        # a server that is down is given up soon, unless the user says otherwise
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient  # type: ignore[import-not-found]

        client = MlflowClient(tracking_uri=self._uri)

        def create() -> str:
            known = client.get_experiment_by_name(self.experiment)
            number = known.experiment_id if known else self._create_experiment(client)
            return client.create_run(number, run_name=origin.name).info.run_id

        number, is_new = origin.kept_id("mlflow", create)
        if is_new:
            for params in _in_parts(dict(_flat(origin.settings, ""))):
                client.log_batch(number, params=params)
        else:
            client.update_run(number, status="RUNNING")
        return _Writer(client, number)

    def _create_experiment(self, client: Any) -> str:
        """A new experiment. A database has its artefacts beside it, and not where the process
        happens to be."""
        place = None
        if self._uri.startswith(_SQLITE):
            place = (Path(self._uri.removeprefix(_SQLITE)).parent / "mlartifacts").as_uri()
        return client.create_experiment(self.experiment, artifact_location=place)


class _Writer:
    """A live run of MLflow."""

    def __init__(self, client: Any, number: str) -> None:
        self._client = client
        self._number = number

    def write(self, round: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric  # type: ignore[import-not-found]

        now = int(1000 * time.time())
        metrics = [Metric(key, value, now, round) for key, value in values.items()]
        self._client.log_batch(self._number, metrics=metrics)

    def show(self, round: int, picture: Path) -> None:
        self._client.log_artifact(self._number, str(picture), "samples")
        folder = clips_folder(picture)
        if clip_files(picture):
            self._client.log_artifacts(self._number, str(folder), f"samples/{folder.name}")

    def keep(self, file: Path) -> None:
        self._client.log_artifact(self._number, str(file))

    def close(self, ended: bool) -> None:
        self._client.set_terminated(self._number, "FINISHED" if ended else "KILLED")


def _flat(settings: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """(dotted path, value) of nested settings, values no longer than MLflow takes."""
    if isinstance(settings, Mapping) and settings:
        for key, value in settings.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    elif isinstance(settings, list) and settings and isinstance(settings[0], Mapping):
        for number, value in enumerate(settings):
            yield from _flat(value, f"{prefix}.{number}")
    else:
        yield prefix, str(settings)[:_LONGEST_PARAM]


def _in_parts(params: Mapping[str, str]) -> Iterator[list[Any]]:
    """Parameters, as many at a time as MLflow takes."""
    from mlflow.entities import Param  # type: ignore[import-not-found]

    every = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(every), _MOST_PARAMS):
        yield every[start : start + _MOST_PARAMS]
