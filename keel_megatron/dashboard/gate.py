"""Access control of the dashboard: an ASGI application in front of MLflow's.

MLflow's server writes anything, and reads any folder that its database names, for everyone who can
connect. Every user of the machine can connect to a loopback port. So a request is forwarded only if

- its Host header is one of the served names (against DNS rebinding),
- it comes from these pages, not from another site's,
- it has the token of this start: in the address that `keel dashboard` prints, then in a cookie,
- and it is one of the requests listed here: they read or, unless the database is another user's,
  change notes, tags and names.

Files are served by this application, not by MLflow: see `artifacts.py`.
"""

from __future__ import annotations

import hmac
import json
import os
import re
from asyncio import to_thread
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, quote

from keel_megatron.dashboard.artifacts import ArtifactFolders, content_type

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

COOKIE = "keel-dashboard-"
"""Beginning of the cookie's name; the port follows."""
_API = "/ajax-api/2.0/mlflow/"
_GET = {
    "/",
    "/health",
    "/version",
    "/ajax-api/3.0/mlflow/server-info",
    *(
        _API + name
        for name in (
            "experiments/get",
            "experiments/get-by-name",
            "experiments/search",
            "metrics/get-history",
            "metrics/get-history-bulk",
            "metrics/get-history-bulk-interval",
            "model-versions/search",
            "registered-models/search",
            "runs/get",
        )
    ),
}
_STATIC = "/static-files/"
_SEARCH = {
    _API + name
    for name in (
        "experiments/search",
        "experiments/search-datasets",
        "logged-models/search",
        "runs/search",
    )
}
"""Requests that read, although their method is POST."""
_EDIT = {
    _API + "runs/set-tag": {"run_id", "run_uuid", "key", "value"},
    _API + "runs/delete-tag": {"run_id", "key"},
    _API + "runs/update": {"run_id", "run_uuid", "run_name"},
    _API + "experiments/set-experiment-tag": {"experiment_id", "key", "value"},
    _API + "experiments/delete-experiment-tag": {"experiment_id", "key"},
    _API + "experiments/update": {"experiment_id", "new_name"},
}
"""Requests allowed by `edit`: notes (which are tags), tags and names, with only these fields."""
_GRAPHQL = "/graphql"
_GRAPHQL_FIELDS = {
    "mlflowGetExperiment",
    "mlflowGetMetricHistoryBulkInterval",
    "mlflowGetRun",
    "mlflowSearchDatasets",
    "mlflowSearchModelVersions",
    "mlflowSearchRuns",
}
"""All reading requests except the one that lists files at the database's locations."""

_MOST_BODY = 4 << 20
_BLOCK = 1 << 20
_SAFE: Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        # MLflow's pages make code at run time. Nothing is fetched from or sent to another host,
        # even if a run's notes contain addresses.
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
        b"base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    ),
]
_ENTER = b"""<!doctype html><title>Keel dashboard</title>
<script>
localStorage["mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"] = "true"
location.replace(location.pathname + location.hash)
</script>"""
"""Opens the pages without the token in the address. A script does so, not a redirect: a cookie that
is SameSite=Strict is sent only with requests of pages of this site. MLflow's assistant, whose
requests are refused, does not open by itself."""


class RefusedError(Exception):
    """A refused request: status and reason."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Gate:
    """The application that the server runs.

    Args:
        app: MLflow's application.
        token: token of this start.
        hosts: exact host names, with port, under which the pages are served.
        artifacts: the runs' files.
        edit: allow changes of notes, tags and names.
    """

    def __init__(
        self, app: App, token: str, hosts: Sequence[str], artifacts: ArtifactFolders, *, edit: bool
    ) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = {host.encode() for host in hosts}
        self._origins = {b"http://" + host for host in self._hosts}
        self._artifacts = artifacts
        self._edit = edit
        # Cookies are not separated by port: two dashboards would share one.
        port = hosts[0].rpartition(":")[2]
        self._cookie = COOKIE + port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or forward it to MLflow."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            return
        try:
            await self._answer(scope, receive, send)
        except RefusedError as refused:
            text = (str(refused) + "\n").encode()
            await _respond(send, refused.status, text, b"text/plain; charset=utf-8")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        path = scope["path"]
        self._check_site(headers, path, scope["method"])
        if self._is_token(query.get("token", [""])[0]) and scope["method"] == "GET":
            await self._enter(send)
            return
        if not self._is_token(self._shown(headers)):
            raise RefusedError(
                401, "open the address, with its token, that `keel dashboard` has printed"
            )
        run = (query.get("run_id") or query.get("run_uuid") or [""])[0]
        name = query.get("path", [""])[0]
        match scope["method"], path:
            case "GET", "/get-artifact":
                await self._send_file(send, run, name)
            case "GET", "/ajax-api/2.0/mlflow/artifacts/list":
                await self._send_list(send, run, name)
            case _:
                body = await self._body(scope, receive)
                await self._forward(scope, receive, send, body)

    def _check_site(self, headers: dict[bytes, list[bytes]], path: str, method: str) -> None:
        """Check the Host header and the origin of a request."""
        hosts, origins = headers.get(b"host", []), headers.get(b"origin", [])
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            raise RefusedError(403, "not a name of this server (keel dashboard --allowed-host)")
        if any(origin not in self._origins for origin in origins):
            raise RefusedError(403, "asked by another site")
        # A browser names the origin. Any site may link to the first page.
        asks = headers.get(b"sec-fetch-site", [b"none"])[0]
        opens = headers.get(b"sec-fetch-mode") == [b"navigate"] and method == "GET" and path == "/"
        if asks not in (b"same-origin", b"none") and not opens:
            raise RefusedError(403, "asked by another site")

    def _shown(self, headers: dict[bytes, list[bytes]]) -> str:
        """The token in a request's cookie."""
        for line in headers.get(b"cookie", []):
            try:
                cookie = SimpleCookie(line.decode("latin-1")).get(self._cookie)
            except CookieError:
                continue
            if cookie is not None:
                return str(cookie.value)
        return ""

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(errors="surrogateescape"), self._token)

    async def _enter(self, send: Send) -> None:
        cookie = f"{self._cookie}={self._token.decode()}; HttpOnly; SameSite=Strict; Path=/"
        more = [(b"set-cookie", cookie.encode()), (b"cache-control", b"no-store")]
        await _respond(send, 200, _ENTER, b"text/html; charset=utf-8", more)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body of an allowed POST; None for a GET, which has none."""
        method, path = scope["method"], scope["path"]
        if method == "GET" and (path in _GET or _is_static(path)):
            return None
        edits = self._edit and path in _EDIT
        if method != "POST" or not (path in _SEARCH or path == _GRAPHQL or edits):
            raise RefusedError(403, "the dashboard does not support this")
        body = await _read(receive)
        if path in _SEARCH:
            return body
        # Serialised again, so that MLflow reads exactly what was checked.
        fields = _json_object(body)
        if edits and not fields.keys() <= _EDIT[path]:
            raise RefusedError(403, "the dashboard edits only notes, tags and names")
        if path == _GRAPHQL:
            names = re.findall(r"\bmlflow\w*", str(fields.get("query", "")))
            if not set(names) <= _GRAPHQL_FIELDS:
                raise RefusedError(403, "the dashboard does not support this")
        return json.dumps(fields).encode()

    async def _forward(
        self, scope: Scope, receive: Receive, send: Send, body: bytes | None
    ) -> None:
        """Forward to MLflow, without the cookie and origin headers."""
        left_out = {b"cookie", b"authorization", b"origin", b"content-length", b"transfer-encoding"}
        headers = [pair for pair in scope["headers"] if pair[0] not in left_out]
        headers.append((b"content-length", str(len(body or b"")).encode()))
        parts = [body or b""]

        async def receive_body() -> MutableMapping[str, Any]:
            if parts:
                return {"type": "http.request", "body": parts.pop(), "more_body": False}
            return await receive()

        async def send_safely(message: MutableMapping[str, Any]) -> None:
            """Send with the security headers, without headers that allow other origins."""
            if message["type"] == "http.response.start":
                ours = {name for name, _value in _SAFE}
                message["headers"] = _SAFE + [
                    pair
                    for pair in message.get("headers", [])
                    if pair[0] not in ours and not pair[0].startswith(b"access-control-")
                ]
            await send(message)

        await self._app({**scope, "headers": headers}, receive_body, send_safely)

    async def _send_list(self, send: Send, run: str, path: str) -> None:
        try:
            files = await to_thread(self._artifacts.list, run, path)
        except FileNotFoundError:
            raise RefusedError(404, "there is no such folder within the run's") from None
        body = json.dumps({"root_uri": "", "files": files}).encode()
        await _respond(send, 200, body, b"application/json")

    async def _send_file(self, send: Send, run: str, path: str) -> None:
        try:
            descriptor, size = await to_thread(self._artifacts.open, run, path)
        except FileNotFoundError:
            raise RefusedError(404, "there is no such file within the run's folder") from None
        name = quote(path.rpartition("/")[2], safe="")
        more = [
            (b"content-disposition", f"attachment; filename*=UTF-8''{name}".encode()),
            (b"cache-control", b"no-cache"),
            (b"content-security-policy", b"sandbox; default-src 'none'"),
        ]
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            await _start(send, 200, size, content_type(path).encode(), more)
            while size > 0 and (block := await to_thread(file.read, min(size, _BLOCK))):
                size -= len(block)
                await send({"type": "http.response.body", "body": block, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _headers(scope: Scope) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name, []).append(value)
    return found


def _is_static(path: str) -> bool:
    return path.startswith(_STATIC) and ".." not in path and "\\" not in path


async def _read(receive: Receive) -> bytes:
    """A request's whole body."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "the body has no end")
        body += message.get("body", b"")
        if len(body) > _MOST_BODY:
            raise RefusedError(413, "the body is too long")
        if not message.get("more_body"):
            return body


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise RefusedError(400, "the body is not a JSON object")
    return fields


async def _start(
    send: Send, status: int, size: int, kind: bytes, more: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    length = (b"content-length", str(size).encode())
    headers = [(b"content-type", kind), length, *_SAFE, *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _respond(
    send: Send, status: int, body: bytes, kind: bytes, more: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    await _start(send, status, len(body), kind, more)
    await send({"type": "http.response.body", "body": body})
