"""Errors of MLflow's client, as a user reads them."""

from __future__ import annotations

import pytest

from keel_megatron.mlflow_delivery.reasons import problem, reason

RETRIED = (
    "API request to http://me:secret@host:5000/api/2.0/mlflow/experiments/get-by-name failed with "
    "exception HTTPConnectionPool(host='host', port=5000): Max retries exceeded with url: "
    "/api/2.0/mlflow/experiments/get-by-name?experiment_name=keel (Caused by {cause})"
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            RETRIED.format(cause="ResponseError('too many 500 error responses')"),
            "HTTP 500 Internal Server Error, ValueError: "
            "ResponseError('too many 500 error responses')",
        ),
        (
            RETRIED.format(
                cause="NewConnectionError('<urllib3.connection.HTTPConnection object at "
                "0x7f12>: Failed to establish a new connection: [Errno 111] Connection refused')"
            ),
            "ValueError: NewConnectionError('Failed to establish a new connection: [Errno 111] "
            "Connection refused')",
        ),
        (
            "API request to endpoint /api/2.0/x failed with error code 418 != 200. Response body: "
            "'I am\na teapot'",
            "HTTP 418, ValueError: API request to endpoint /api/2.0/x failed with error code 418 "
            "!= 200. Response body: 'I am a teapot'",
        ),
        ("", "ValueError: "),
    ],
)
def test_a_reason_keeps_the_status_and_the_words(text: str, told: str) -> None:
    assert reason(ValueError(text)) == told
    assert problem(ValueError(text)) == f"does not answer: {told}"


def test_a_long_reason_ends_with_a_whole_word() -> None:
    told = reason(ValueError("http://me:secret@host/" + "x" * 200 + " and " + "y" * 300))
    assert told == f"ValueError: http://***@host/{'x' * 200} and ..."
    assert reason(ValueError("z" * 400)).endswith("z ...")


@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_name_the_variables(status: int) -> None:
    error = ValueError(f"API request to endpoint /x failed with error code {status} != 200. Re")
    assert problem(error) == (
        f"refuses the credentials (HTTP {status}): set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    )
