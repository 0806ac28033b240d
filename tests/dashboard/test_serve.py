"""What users get wrong with `keel dashboard`."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest

from keel_megatron.config.errors import UserError
from keel_megatron.dashboard.serve import serve
from keel_megatron.dashboard.server import free_port
from tests.dashboard.test_runs import make_run
from tests.ports import reserved_port


def test_a_taken_port_is_refused() -> None:
    with reserved_port() as port:
        with (
            socket.create_server(("127.0.0.1", port)),
            pytest.raises(UserError, match=f"--port: {port} on 127.0.0.1 cannot be had"),
        ):
            free_port(port)
        assert free_port(port) == port
    assert free_port(0) > 0


def test_runs_without_a_local_database_are_named(tmp_path: Path) -> None:
    make_run(tmp_path, "plain")
    remote = make_run(tmp_path, "remote") / "config.yaml"
    text = remote.read_text().replace("uri: null", "uri: https://me:secret@host/")
    remote.write_text(text.replace("mlflow: false", "mlflow: true"))
    said: list[str] = []
    with pytest.raises(UserError, match="none of these runs has a local MLflow database"):
        serve([tmp_path], 0, open_browser=False, say=said.append)
    assert said == [
        "plain cannot be shown: tracking.mlflow is false",
        "remote reports to https://***@host/: look there",
    ]


def test_without_the_extra_it_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (make_run(tmp_path, "run") / "mlflow.db").touch()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "flask" else find(name)
    )
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '.\[dashboard\]'"):
        serve([tmp_path], 0, open_browser=False)
