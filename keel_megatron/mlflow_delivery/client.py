"""The MLflow client as this project uses it. Importing MLflow takes seconds: only when asked."""

from __future__ import annotations

import logging
import os
from typing import Any

_DEFAULTS = {
    # A training job tells MLflow's makers nothing unless its user says so, and the run's address is
    # said by us, without the password that it may hold.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The caller itself tries again; MLflow's own 7 attempts of 120 s would keep it for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_KIND = {"mlflow.experimentKind": "custom_model_development"}
"""An experiment's tag: MLflow shows the pages for training, not those for LLM applications."""


def open_client(uri: str) -> Any:
    """A client of a tracking URI.

    The URI is always given: MLflow's own default would be set by whatever mlruns folder lies in the
    working directory.

    Raises:
        ImportError: MLflow is not installed.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # Importing MLflow makes its loggers tell of every table that they create.
    logging.getLogger("alembic").setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri)


def experiment_id(client: Any, name: str, artifacts: str | None, *, local: bool) -> str:
    """The id of an experiment, which is made if it is not there.

    Args:
        client: MLflow's.
        name: the experiment's.
        artifacts: where the files of a new experiment go; None = as the server says.
        local: restore it if it is deleted, as MLflow's own "Default" is in a local database.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifacts, tags=_KIND))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another run has just made it
    if local and found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)
