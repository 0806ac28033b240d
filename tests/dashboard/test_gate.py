"""What goes through to MLflow's server, and what does not."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.dashboard import artifacts
from keel_megatron.dashboard.artifacts import ArtifactFolders
from keel_megatron.dashboard.gate import Gate

pytestmark = pytest.mark.security

HOST, TOKEN, RUN = "127.0.0.1:5000", "the-token", "a" * 32
COOKIE = f"keel-dashboard-5000={TOKEN}"
API = "/ajax-api/2.0/mlflow/"


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    reached: dict[str, Any] | None = None
    """The request as MLflow got it, if it did."""


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    files = tmp_path / "run" / "mlflow_artifacts" / RUN / "artifacts"
    (files / "depth").mkdir(parents=True)
    (files / "depth" / "map.png").write_bytes(b"a picture")
    (files / "page.html").write_text("<script>")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "id_rsa").write_text("the key")
    return tmp_path / "run"


@pytest.fixture
def ask(run_folder: Path) -> Any:
    """Ask the gate for something, by default as a page of the dashboard does."""

    def ask(
        path: str,
        query: str = "",
        *,
        method: str = "GET",
        body: Any = None,
        cookie: str = COOKIE,
        host: str = HOST,
        edit: bool = False,
        **headers: str,
    ) -> Answer:
        answer = Answer()

        async def mlflow(scope: Any, receive: Any, send: Any) -> None:
            sent = (await receive())["body"]
            answer.reached = {"headers": dict(scope["headers"]), "body": sent}
            more = [(b"access-control-allow-origin", b"http://localhost:1")]
            await send({"type": "http.response.start", "status": 200, "headers": more})
            await send({"type": "http.response.body", "body": b"MLflow"})

        async def receive() -> MutableMapping[str, Any]:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return {"type": "http.request", "body": content}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            answer.body += message.get("body", b"")

        given = {"host": host, "cookie": cookie} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(k.encode(), v.encode()) for k, v in given.items() if v],
        }
        gate = Gate(
            mlflow, TOKEN, [HOST, "localhost:5000"], ArtifactFolders([run_folder]), edit=edit
        )
        asyncio.run(gate(scope, receive, send))
        return answer

    return ask


PATHS = ["/", "/static-files/static/js/main.js", "/health", API + "runs/get", "/get-artifact", "/x"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cookie", ["", f"{COOKIE}x", "keel-dashboard-5000=", "a=b"])
def test_without_the_token_nothing_is_answered(ask: Any, path: str, cookie: str) -> None:
    for query in ("", "token=", "token=other"):
        answer = ask(path, query, cookie=cookie)
        assert (answer.status, answer.reached) == (401, None)


def test_the_token_becomes_a_cookie_and_leaves_the_address(ask: Any) -> None:
    answer = ask("/", f"token={TOKEN}", cookie="", sec_fetch_site="none")
    assert answer.status == 200
    assert "location.replace(location.pathname + location.hash)" in answer.body.decode()
    assert answer.headers["set-cookie"] == f"{COOKIE}; HttpOnly; SameSite=Strict; Path=/"
    assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "host", ["10.evil.example:5000", "192.168.1.1:5000", "evil.example:5000", "127.0.0.1", ""]
)
def test_another_name_is_not_answered(ask: Any, host: str) -> None:
    assert ask("/", f"token={TOKEN}", host=host).status == 403


def test_pages_go_through_and_mlflow_does_not_see_the_token(ask: Any) -> None:
    for path in ("/", "/static-files/static/js/main.js", API + "runs/get"):
        answer = ask(path, host="localhost:5000", sec_fetch_site="same-origin")
        assert answer.status == 200
        assert b"cookie" not in answer.reached["headers"]
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["x-frame-options"] == "DENY"
    answer = ask(API + "runs/search", method="POST", body={"experiment_ids": ["1"]})
    assert json.loads(answer.reached["body"]) == {"experiment_ids": ["1"]}


def test_another_site_is_not_answered_though_the_browser_sends_the_cookie(ask: Any) -> None:
    for headers in (
        {"origin": "http://127.0.0.1:6000"},
        {"origin": "null"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "no-cors"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "cors"},
    ):
        assert ask(API + "experiments/search", **headers).status == 403
    followed = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert ask("/", **followed).status == 200
    assert ask(API + "experiments/search", **followed).status == 403


REFUSED = [
    ("POST", API + "experiments/create"),
    ("POST", API + "runs/create"),
    ("POST", API + "runs/delete"),
    ("POST", API + "runs/log-batch"),
    ("POST", API + "upload-artifact"),
    ("POST", API + "artifacts/presigned-upload-url"),
    ("PUT", "/ajax-api/2.0/mlflow-artifacts/artifacts/x"),
    ("GET", "/ajax-api/2.0/mlflow-artifacts/artifacts/x"),
    ("GET", "/model-versions/get-artifact"),
    ("GET", "/ajax-api/2.0/mlflow/logged-models/m-1/artifacts/files"),
    ("GET", "/ajax-api/3.0/mlflow/get-trace-artifact"),
    ("POST", "/ajax-api/3.0/mlflow/assistant/message"),
    ("GET", "/ajax-api/3.0/mlflow/assistant/config"),
    ("GET", "/ajax-api/2.0/mlflow/gateway-proxy"),
    ("POST", "/ajax-api/3.0/mlflow/gateway/secrets/create"),
    ("POST", "/api/2.0/mlflow/runs/create"),
    ("GET", "/graphql"),
    ("GET", "//get-artifact"),
    ("GET", "/static-files/../../secret"),
    ("HEAD", "/"),
    ("OPTIONS", API + "runs/get"),
]


@pytest.mark.parametrize(("method", "path"), REFUSED)
def test_whatever_is_not_listed_is_refused(ask: Any, method: str, path: str) -> None:
    for edit in (False, True):
        answer = ask(path, method=method, body={}, edit=edit)
        assert (answer.status, answer.reached) == (403, None)


def test_notes_tags_and_names_alone_are_changed_and_not_in_a_copy(ask: Any) -> None:
    note = {"run_id": RUN, "key": "mlflow.note.content", "value": "good"}
    name = {"run_id": RUN, "run_name": "better"}
    for path, body in (("runs/set-tag", note), ("runs/update", name)):
        assert ask(API + path, method="POST", body=body).status == 403
        assert json.loads(ask(API + path, method="POST", body=body, edit=True).reached["body"]) == (
            body
        )
    for path, body in (
        ("runs/update", {**name, "status": "FAILED"}),
        ("experiments/update", {"experiment_id": "1", "artifact_location": "file:///"}),
    ):
        answer = ask(API + path, method="POST", body=body, edit=True)
        assert (answer.status, answer.reached) == (403, None)
    assert ask(API + "runs/update", method="POST", body=b"[]", edit=True).status == 400


def test_graphql_lists_no_files(ask: Any) -> None:
    def query(text: str) -> Answer:
        answer: Answer = ask("/graphql", method="POST", body={"query": text})
        return answer

    assert query("query GetRun { mlflowGetRun(input: $i) { run { info { runId } } } }").reached
    for text in ("{ mlflowListArtifacts }", "{ a: mlflowListArtifacts(input: $i) { rootUri } }"):
        answer = query(text)
        assert (answer.status, answer.reached) == (403, None)


def test_a_long_body_is_refused(ask: Any) -> None:
    answer = ask(API + "runs/search", method="POST", body=b" " * (5 << 20))
    assert (answer.status, answer.reached) == (413, None)


def test_a_runs_files_are_listed_and_sent(ask: Any) -> None:
    listed = json.loads(ask(API + "artifacts/list", f"run_uuid={RUN}").body)["files"]
    assert listed == [
        {"path": "depth", "is_dir": True},
        {"path": "page.html", "is_dir": False, "file_size": 8},
    ]
    inner = json.loads(ask(API + "artifacts/list", f"run_id={RUN}&path=depth").body)["files"]
    assert inner == [{"path": "depth/map.png", "is_dir": False, "file_size": 9}]
    picture = ask("/get-artifact", f"run_uuid={RUN}&path=depth/map.png")
    assert (picture.body, picture.headers["content-type"]) == (b"a picture", "image/png")
    assert picture.headers["content-disposition"] == "attachment; filename*=UTF-8''map.png"
    assert (
        ask("/get-artifact", f"run_id={RUN}&path=page.html")
        .headers["content-type"]
        .startswith("text/plain")
    )


def test_files_elsewhere_are_not_there(ask: Any, run_folder: Path) -> None:
    home, files = run_folder.parent / "secret", run_folder / "mlflow_artifacts" / RUN / "artifacts"
    (files / "link").symlink_to(home)
    (files / "key").symlink_to(home / "id_rsa")
    os.mkfifo(files / "fifo")
    other = "b" * 32
    (run_folder / "mlflow_artifacts" / other).mkdir()
    (run_folder / "mlflow_artifacts" / other / "artifacts").symlink_to(home)
    for run, path in (
        (RUN, "link/id_rsa"),
        (RUN, "key"),
        (RUN, "fifo"),
        (RUN, "depth"),
        (RUN, "../../../../secret/id_rsa"),
        (RUN, f"{home}/id_rsa"),
        (RUN, "x%00y"),
        (other, "id_rsa"),
        ("../" + RUN, "page.html"),
        ("..", "id_rsa"),
        ("", "page.html"),
    ):
        assert ask("/get-artifact", f"run_uuid={run}&path={path}").status == 404, path
    for run, path in ((RUN, "link"), (RUN, ".."), (other, "")):
        assert ask(API + "artifacts/list", f"run_uuid={run}&path={path}").status == 404, path
    names = [file["path"] for file in ArtifactFolders([run_folder]).list(RUN, "")]
    assert names == ["depth", "page.html"]


def test_nothing_is_sent_that_a_browser_would_run() -> None:
    for name in ("a.html", "a.xhtml", "a.xml", "a.js", "a.yaml", "a.log"):
        assert artifacts.content_type(name).startswith("text/plain"), name
    assert artifacts.content_type("a.pickle") == "application/octet-stream"
