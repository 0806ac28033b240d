"""The MLflow client. MLflow is imported only when needed, because that takes seconds."""

from __future__ import annotations

import logging
import os
from typing import Any

_DEFAULTS = {
    # No usage statistics are sent to MLflow's developers unless the user enables them. The run's
    # address is printed by us, without passwords.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The caller retries; MLflow's own 7 attempts of 120 s would block it for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_KIND = {"mlflow.experimentKind": "custom_model_development"}
"""An experiment's tag: MLflow shows the pages for training, not those for LLM applications."""


def open_client(uri: str) -> Any:
    """A client of a tracking URI.

    The URI is always explicit: MLflow's default depends on an mlruns folder in the working
    directory.

    Raises:
        ImportError: MLflow is not installed.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # Importing MLflow makes its loggers report every table that they create.
    logging.getLogger("alembic").setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri)


def experiment_id(client: Any, name: str, artifacts: str | None, *, local: bool) -> str:
    """The id of an experiment, which is created if it does not exist.

    Args:
        client: MLflow's client.
        name: name of the experiment.
        artifacts: location of a new experiment's files; None = chosen by the server.
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
            found = client.get_experiment_by_name(name)  # another run has just created it
    if local and found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)
