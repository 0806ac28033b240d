"""Start MLflow's server from the environment, as docker/compose.yaml does.

KEEL_MLFLOW_STORE       database: postgresql+psycopg2://USER@HOST:PORT/NAME, or sqlite:////FILE
KEEL_MLFLOW_PASSWORD    the database user's password, if it has one
KEEL_MLFLOW_ARTIFACTS   folder of the artifacts, default /mlflow/artifacts
KEEL_MLFLOW_HOSTS       HOST:PORT each by which the server is asked for, separated by commas, beside
                        localhost and 127.0.0.1 with KEEL_MLFLOW_PORT; exact, without wildcards
KEEL_MLFLOW_AUTH        none (default; only if KEEL_BIND is loopback), or basic: users and passwords
KEEL_MLFLOW_ADMIN_PASSWORD, KEEL_MLFLOW_SECRET_KEY
                        needed for basic: the first password of the user admin (12 characters or
                        more), and a random text that signs the pages' forms
KEEL_MLFLOW_HOST, KEEL_MLFLOW_PORT
                        where it listens, default 0.0.0.0 (inside a container) and 5000
KEEL_BIND               the address on which the container's port is published, as compose.yaml has
                        it; default KEEL_MLFLOW_HOST

A setting NAME may be given as NAME_FILE, a file that holds it (a docker secret).
"""

from __future__ import annotations

import ipaddress
import os
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

LEAST_PASSWORD = 12


def setting(name: str, default: str | None = None) -> str:
    """A setting, its file's content, or the default; without any, an end with a message."""
    file = os.environ.get(f"{name}_FILE")
    value = Path(file).read_text(encoding="utf-8").strip() if file else os.environ.get(name)
    if value:
        return value
    if default is None:
        raise SystemExit(f"{name} is not set: see docker/mlflow_server.py")
    return default


def store_uri() -> str:
    """The database's URI with the password in it."""
    uri, password = setting("KEEL_MLFLOW_STORE"), setting("KEEL_MLFLOW_PASSWORD", "")
    if not password:
        return uri
    scheme, _, rest = uri.partition("://")
    user, _, place = rest.rpartition("@")
    return f"{scheme}://{user}:{quote(password, safe='')}@{place}"


def authentication(uri: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment that switch users and passwords on, or leave them off."""
    kind = setting("KEEL_MLFLOW_AUTH", "none")
    if kind == "none":
        bind = setting("KEEL_BIND", setting("KEEL_MLFLOW_HOST", "0.0.0.0"))
        if not is_loopback(bind):
            raise SystemExit(
                f"KEEL_BIND: {bind} is open to other machines, and KEEL_MLFLOW_AUTH is none:"
                " whoever reaches it could change and delete every run. Set KEEL_MLFLOW_AUTH=basic,"
                " or publish on 127.0.0.1"
            )
        return [], {}
    if kind != "basic":
        raise SystemExit(f"KEEL_MLFLOW_AUTH: {kind} is neither none nor basic")
    password = setting("KEEL_MLFLOW_ADMIN_PASSWORD")
    if len(password) < LEAST_PASSWORD:
        raise SystemExit(f"KEEL_MLFLOW_ADMIN_PASSWORD: give {LEAST_PASSWORD} characters or more")
    # MLflow reads these two from a file only; a temporary one is its owner's alone.
    descriptor, path = tempfile.mkstemp(suffix=".ini")
    with os.fdopen(descriptor, "w", encoding="utf-8") as config:
        database = uri.replace("%", "%%")
        config.write(f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database}\n")
    return ["--app-name", "basic-auth"], {
        "MLFLOW_AUTH_CONFIG_PATH": path,
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": setting("KEEL_MLFLOW_SECRET_KEY"),
    }


def is_loopback(bind: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return bind == "localhost" or ipaddress.ip_address(bind.strip("[]")).is_loopback
    except ValueError:
        return False


def allowed_hosts(port: str) -> str:
    """The Host headers that are answered; a stranger's name for this address is none of them."""
    given = [name.strip() for name in setting("KEEL_MLFLOW_HOSTS", "").split(",") if name.strip()]
    for name in given:
        if "*" in name:
            raise SystemExit(f"KEEL_MLFLOW_HOSTS: {name} must be HOST:PORT, without a wildcard")
    return ",".join([f"localhost:{port}", f"127.0.0.1:{port}", *given])


def main() -> None:
    uri = store_uri()
    arguments, secrets = authentication(uri)
    port = setting("KEEL_MLFLOW_PORT", "5000")
    environment = {
        # Not as arguments, which every process of the machine can read.
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        **secrets,
    }
    command = [sys.executable, "-m", "mlflow", "server", "--serve-artifacts"]
    command += ["--artifacts-destination", setting("KEEL_MLFLOW_ARTIFACTS", "/mlflow/artifacts")]
    command += ["--host", setting("KEEL_MLFLOW_HOST", "0.0.0.0")]
    command += ["--port", port, "--workers", "2", "--allowed-hosts", allowed_hosts(port)]
    os.execve(sys.executable, [*command, *arguments], os.environ | environment)


if __name__ == "__main__":
    main()
