"""What users get wrong with `keel dashboard`."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import webbrowser
from pathlib import Path
from types import SimpleNamespace

import pytest

from keel_megatron.dashboard import serve as serve_module
from keel_megatron.dashboard.serve import serve
from keel_megatron.dashboard.server import listen
from keel_megatron.errors import UserError
from tests.dashboard.test_runs import make_run
from tests.ports import reserved_port


def test_a_taken_port_is_refused() -> None:
    with reserved_port() as port:
        with (
            socket.create_server(("127.0.0.1", port)),
            pytest.raises(UserError, match=f"--port: {port} on 127.0.0.1 is not available"),
        ):
            listen(port)
        with listen(port) as listener:
            assert listener.getsockname()[1] == port


def test_without_the_extra_it_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, "run")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "flask" else find(name)
    )
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '.\[dashboard\]'"):
        serve([tmp_path], 0, open_browser=False)


def test_another_user_s_database_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is copied, and with the numbers."""
    database = tmp_path / "mlflow.db"
    with database.open("wb") as file:
        file.truncate(5 << 30)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1 << 30))
    with pytest.raises(UserError, match=r"5,\d\d\d MB are needed, 1,074 MB are free.*TMPDIR"):
        serve_module._copy(database, temporary)
    assert not list(temporary.iterdir())


def test_the_browser_is_given_a_file_and_not_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process's arguments are anybody's to read."""
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    serve_module._open(tmp_path, "http://127.0.0.1:1/?token=t&x#/runs")
    assert opened == [(tmp_path / "open.html").as_uri()]
    assert "url=http://127.0.0.1:1/?token=t&amp;x#/runs" in (tmp_path / "open.html").read_text()
