"""URLs as they are shown: no user part, no query, no fragment, whatever form they have."""

from __future__ import annotations

import io
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel_megatron.config import ConfigError, UserError
from keel_megatron.config.load import load_config
from keel_megatron.mlflow_delivery.reasons import reason
from keel_megatron.tracking.progress import Progress
from keel_megatron.urls import without_credentials

# What a URL may have in it, and some of what it may not; a canary that appears nowhere else.
_WORDS = st.text(string.ascii_letters + string.digits + "-._~!$&()*+,;=%:@/?#'", max_size=8)
_SECRETS = st.tuples(_WORDS, _WORDS).map(lambda parts: f"{parts[0]}hunter2{parts[1]}")
_SCHEMES = st.sampled_from(["http", "https", "HTTPS", "postgresql+psycopg2", "databricks", "s3"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pa@ss@host:5000/x", "http://***@host:5000/x"),
        ("http://me:pa?s#s@host/x", "http://***"),
        ("postgresql+psycopg2://me:p@db/runs", "postgresql+psycopg2://***@db/runs"),
        ("postgresql://me:sec/ret@db/runs", "postgresql://***@db/runs"),
        ("sqlite:////home/a@b/run#1/mlflow.db", "sqlite:////home/a@b/run#1/mlflow.db"),
        ("sqlite:////a.db?key=hunter2", "sqlite:////a.db?***"),
        ("sqlite+pysqlcipher://:hunter2@/a.db", "sqlite+pysqlcipher://***@/a.db"),
        ("https://host/x?api_key=hunter2&a=b", "https://host/x?***"),
        ("(https://host:1/x#token=hunter2).", "(https://host:1/x#***)."),
        ("'http://host:5000', \"http://[::1]:80\"", "'http://host:5000', \"http://[::1]:80\""),
        ("at http://host:5000: no", "at http://host:5000: no"),
        ("http://me:half a password", "http://*** a password"),
        ("with url: /mlflow/get?sig=hunter2 (", "with url: /mlflow/get?*** ("),
        ("mail me@host", "mail me@host"),
    ],
)
def test_credentials_are_not_shown(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


@pytest.mark.security
@given(_SCHEMES, _SECRETS, st.sampled_from(["user", "password", "query", "fragment", "option"]))
def test_no_secret_of_any_url_is_shown(scheme: str, secret: str, where: str) -> None:
    url = {
        "user": f"{scheme}://{secret}@host:5000/x",
        "password": f"{scheme}://me:{secret}@host:5000/x",
        "query": f"{scheme}://host:5000/x?{secret}",
        "fragment": f"{scheme}://host:5000/x#{secret}",
        "option": f"{scheme}://host/x?a=b&token={secret}#c",
    }[where]
    error = ConnectionError(f"no answer from '{url}' (tried: {url}), and that is all")
    told: list[Any] = [
        without_credentials(url),
        without_credentials(str(error)),
        UserError(f"tracking.uri: {url!r} is wrong"),
        reason(error),
    ]
    assert [str(text) for text in told if "hunter2" in str(text)] == []


@pytest.mark.security
@pytest.mark.parametrize(
    "value",
    [
        "https://me:hunter2@host",
        "https://hunter2@host",
        "https://host/x?api_key=hunter2",
        "https://host/x?sig=hunter2",
        "https://host#token=hunter2",
        "sqlite+pysqlcipher://:hunter2@/a.db",
        "sqlite:////a.db?key=hunter2",
        "postgresql://db/x?sslmode=require&sslpassword=hunter2",
        "mssql+pyodbc:///?odbc_connect=PWD%3Dhunter2",
        "me:hunter2@host",
        "[https://me:hunter2@host]",
        "{a: 'https://me:hun hunter2@host'}",
    ],
)
@pytest.mark.parametrize("setting", ["tracking.uri", "training.steps", "nothing.known"])
def test_no_error_of_a_configuration_shows_a_url_s_secret(setting: str, value: str) -> None:
    if "://" not in value and setting != "tracking.uri":
        return
    if " " in value and setting != "tracking.uri":
        return  # no URL
    demo = Path(__file__).parents[1] / "yaml" / "demo.yaml"
    with pytest.raises(ConfigError) as refused:
        load_config(demo, [f"{setting}={value}"])
    assert "hunter2" not in str(refused.value)


@pytest.mark.security
def test_neither_terminal_nor_log_gets_a_url_s_secret(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = Progress(10, tmp_path / "log.txt", 1, stream)
    progress.say("see https://host/x?token=hunter2")
    progress.note("Traceback: https://me:hunter2@host refused")
    progress.close()
    assert "hunter2" not in stream.getvalue() + (tmp_path / "log.txt").read_text()
    assert "https://host/x?***" in stream.getvalue()
