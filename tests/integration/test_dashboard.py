"""`keel dashboard` as another user of the machine sees it, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from keel_megatron.config.load import dump_config
from keel_megatron.mlflow_delivery.mlflow_run import MlflowRun, Point
from keel_megatron.mlflow_delivery.target import Target
from tests.integration.commands import environment
from tests.tracking.samples import config, mlflow_runs

pytestmark = pytest.mark.security
API = "ajax-api/2.0/mlflow"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")


@dataclass
class Dashboard:
    process: subprocess.Popen[str]
    url: str
    token: str
    run_id: str
    run: Path
    temporary: Path

    def worker(self) -> int:
        """The server's process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(children)


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """A dashboard over a run with a step and a file."""
    home = tmp_path_factory.mktemp("home")
    saved = config(home, training__name="run", tracking__mlflow=True)
    run = saved.training.folder
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(saved))
    store = MlflowRun(run, Target.of(saved))
    store.start("once", None, 1000)
    store.log([Point("loss", 4.0, 1, 1000)])
    (home / "notes.txt").write_text("good")
    store.log_file(home / "notes.txt")
    store.end("FINISHED")
    temporary = home / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "keel_megatron", "dashboard", str(run), "--port", "0"],
        env=environment() | {"TMPDIR": str(temporary)},
        cwd=home,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines: list[str] = []
        while "until Ctrl-C" not in "".join(lines):
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        found = re.search(r"(http://127\.0\.0\.1:\d+/)\?token=(\S+?)#", "".join(lines))
        assert found is not None
        yield Dashboard(process, found[1], found[2], str(store.run_id), run, temporary)
    finally:
        process.kill()
        process.wait()


def ask(url: str, *options: str, stranger: bool = True) -> tuple[int, str]:
    """Status and body of a request, made as another user."""
    user = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
    code = (
        "import sys, urllib.request as r, urllib.error\n"
        "url, method, body, *pairs = sys.argv[1:]\n"
        "headers = dict(pair.split(': ', 1) for pair in pairs)\n"
        "q = r.Request(url, method=method, data=body.encode() or None, headers=headers)\n"
        "o = r.build_opener(r.ProxyHandler({}))\n"
        "try: a = o.open(q, timeout=60)\n"
        "except urllib.error.HTTPError as error: a = error\n"
        "print(a.status, a.read().decode())"
    )
    python = [*(user if stranger else []), "/usr/bin/env", "python3", "-I", "-c", code]
    method, body, *headers = [*options, "", ""] if len(options) < 2 else options
    done = subprocess.run(
        [*python, url, method or "GET", body, *[header for header in headers if header]],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    status, _, text = done.stdout.partition(" ")
    return int(status), text


@as_root
def test_another_user_neither_reads_nor_writes(dashboard: Dashboard, tmp_path: Path) -> None:
    url, run = dashboard.url, dashboard.run_id
    create = '{"name": "x", "artifact_location": "file:///tmp"}'
    for path, method, body in (
        ("", "GET", ""),
        ("static-files/favicon.ico", "GET", ""),
        ("health", "GET", ""),
        (f"{API}/experiments/search?max_results=9", "GET", ""),
        (f"{API}/experiments/create", "POST", create),
        (f"{API}/runs/create", "POST", '{"experiment_id": "1"}'),
        (f"{API}/upload-artifact?run_uuid={run}&path=.bashrc", "POST", "text"),
        (f"get-artifact?run_uuid={run}&path=notes.txt", "GET", ""),
        (f"{API}/artifacts/list?run_uuid={run}", "GET", ""),
        ("graphql", "POST", "{}"),
        ("?token=guess", "GET", ""),
    ):
        kind = "Content-Type: application/json"
        assert ask(url + path, method, body, kind)[0] == 401, path
    rebound = f"Host: 10.evil.example:{url.split(':')[2].rstrip('/')}"
    assert ask(url, "GET", "", rebound)[0] == 403
    # Not in what every user can read of a process, either.
    seen = subprocess.run(["ps", "axeww"], capture_output=True, text=True, check=True).stdout
    assert dashboard.token not in seen
    assert (dashboard.temporary / os.listdir(dashboard.temporary)[0]).stat().st_mode & 0o77 == 0


def test_the_owner_reads_and_writes_notes_alone(dashboard: Dashboard) -> None:
    url, run = dashboard.url, dashboard.run_id
    cookie = f"Cookie: keel-dashboard-{url.split(':')[2].rstrip('/')}={dashboard.token}"

    def owner(path: str, method: str = "GET", body: str = "") -> tuple[int, str]:
        kind = "Content-Type: application/json"
        return ask(url + path, method, body, cookie, kind, stranger=False)

    assert "MLflow" in owner("")[1]
    assert '"run"' in owner(f"{API}/runs/search", "POST", '{"experiment_ids": ["1"]}')[1]
    assert owner(f"get-artifact?run_uuid={run}&path=notes.txt") == (200, "good\n")
    files = dashboard.run / "mlflow_artifacts" / run / "artifacts"
    (files / "all").symlink_to("/")
    assert owner(f"get-artifact?run_uuid={run}&path=all/etc/passwd")[0] == 404
    assert owner(f"get-artifact?run_uuid={run}&path=../../../config.yaml")[0] == 404
    for path, body in (
        ("experiments/create", '{"name": "x"}'),
        ("runs/create", '{"experiment_id": "1"}'),
        (f"upload-artifact?run_uuid={run}&path=x", "text"),
    ):
        assert owner(f"{API}/{path}", "POST", body)[0] == 403, path
    assert owner("ajax-api/3.0/mlflow/assistant/config")[0] == 403
    note = f'{{"run_id": "{run}", "key": "mlflow.note.content", "value": "the good one"}}'
    assert owner(f"{API}/runs/set-tag", "POST", note)[0] == 200
    (found,) = mlflow_runs(config(dashboard.run.parent))
    assert found.data.tags["mlflow.note.content"] == "the good one", "and it is kept"


def test_a_killed_dashboard_leaves_no_server(dashboard: Dashboard) -> None:
    worker = dashboard.worker()
    assert list(dashboard.temporary.iterdir())
    dashboard.process.send_signal(signal.SIGKILL)
    dashboard.process.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}/cmdline").exists() and Path(f"/proc/{worker}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not list(dashboard.temporary.iterdir())
