"""The images' parts that need no container engine: MLflow's server, constraints, compose, lint."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

import yaml
from tests.ports import reserved_port
from tools.image_steps import Image, instructions
from tools.lock import LEFT_OUT, requirements

DOCKER = Path(__file__).resolve().parents[2] / "docker"
SERVER = DOCKER / "mlflow_server.py"
PASSWORD = "correct horse battery % staple"


def run_server(**settings: str) -> subprocess.CompletedProcess[str]:
    """The server's start with settings under which it does not start."""
    environment = {"PATH": os.environ["PATH"], **settings}
    return subprocess.run(
        [sys.executable, str(SERVER)], env=environment, capture_output=True, text=True, timeout=300
    )


def test_what_the_server_lacks_is_named() -> None:
    assert run_server().stderr == "KEEL_MLFLOW_STORE is not set: see docker/mlflow_server.py\n"
    store = {"KEEL_MLFLOW_STORE": "sqlite:////nowhere", "KEEL_MLFLOW_AUTH": "basic"}
    assert "KEEL_MLFLOW_ADMIN_PASSWORD is not set" in run_server(**store).stderr
    short = run_server(**store, KEEL_MLFLOW_ADMIN_PASSWORD="password1234"[:11])
    assert short.stderr == "KEEL_MLFLOW_ADMIN_PASSWORD: give 12 characters or more\n"
    wrong = run_server(KEEL_MLFLOW_STORE="sqlite:////nowhere", KEEL_MLFLOW_AUTH="ldap")
    assert wrong.stderr == "KEEL_MLFLOW_AUTH: ldap is neither none nor basic\n"


@pytest.mark.security
@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "[::]", "10.0.0.7", "host.example", None])
def test_an_open_address_needs_passwords(bind: str | None) -> None:
    settings = {"KEEL_MLFLOW_STORE": "sqlite:////nowhere/x"}
    refused = run_server(**settings, **({} if bind is None else {"KEEL_BIND": bind}))
    assert refused.returncode == 1
    assert "is open to other machines, and KEEL_MLFLOW_AUTH is none" in refused.stderr


@pytest.mark.security
def test_no_pattern_of_hosts_is_taken() -> None:
    settings = {"KEEL_MLFLOW_STORE": "sqlite:////nowhere/x", "KEEL_BIND": "127.0.0.1"}
    wrong = run_server(**settings, KEEL_MLFLOW_HOSTS="a:5000,10.*")
    assert wrong.stderr == "KEEL_MLFLOW_HOSTS: 10.* must be HOST:PORT, without a wildcard\n"


@contextmanager
def server(tmp_path: Path, **settings: str) -> Iterator[str]:
    """MLflow's server as the image starts it, on a free port of loopback."""
    with reserved_port() as port, _server(tmp_path, port, settings) as url:
        yield url


@contextmanager
def _server(tmp_path: Path, port: int, settings: dict[str, str]) -> Iterator[str]:
    environment = os.environ | {
        "KEEL_MLFLOW_STORE": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "KEEL_MLFLOW_ARTIFACTS": str(tmp_path / "artifacts"),
        "KEEL_MLFLOW_HOST": "127.0.0.1",
        "KEEL_MLFLOW_PORT": str(port),
        **settings,
    }
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(SERVER)], env=environment, stdout=log, stderr=log, cwd=tmp_path
        )
    try:
        deadline = time.monotonic() + 300
        while answer(f"http://127.0.0.1:{port}/health") != 200:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(300)


def answer(url: str, **headers: str) -> int:
    """The status of an answer; 0 if there is none."""
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as found:
            return int(found.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.slow
@pytest.mark.security
def test_one_setting_asks_for_passwords(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(PASSWORD + "\n")
    settings = {
        "KEEL_MLFLOW_AUTH": "basic",
        "KEEL_MLFLOW_ADMIN_PASSWORD_FILE": str(secret),
        "KEEL_MLFLOW_SECRET_KEY": "a key",
        "KEEL_MLFLOW_HOSTS": "mlflow:5000",
    }
    with server(tmp_path, **settings) as url:
        search = f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0"

        def basic(password: str) -> str:
            return "Basic " + base64.b64encode(f"admin:{password}".encode()).decode()

        assert answer(search) == 401
        assert answer(search, Authorization=basic("password1234")) == 401
        assert answer(search, Authorization=basic(PASSWORD)) == 200
        assert answer(search, Authorization=basic(PASSWORD), Host="mlflow:5000") == 200
        # A stranger's names for this address; a pattern for private ones would take them.
        for name in ("evil.example", "10.evil.example", "192.168.evil.example:5000", "localhost:1"):
            assert answer(search, Authorization=basic(PASSWORD), Host=name) == 403


def test_compose_publishes_on_loopback_and_holds_no_password() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    published = [p for service in compose["services"].values() for p in service.get("ports", ())]
    assert published == ["${KEEL_BIND:-127.0.0.1}:${KEEL_MLFLOW_PORT:-5000}:5000"]
    # What the server judges by is what is published.
    server = compose["services"]["mlflow"]["environment"]
    assert server["KEEL_BIND"] == "${KEEL_BIND:-127.0.0.1}"
    assert "*" not in server["KEEL_MLFLOW_HOSTS"]
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if "PASSWORD" in name or "KEY" in name:
                assert re.fullmatch(r"\$\{\w+(:-|:\?[^}]*)\}", value), (name, value)
        assert set(service.get("depends_on", {})) <= set(compose["services"])
    for line in (DOCKER / "env.example").read_text().splitlines():
        name, _, value = line.partition("=")
        assert not (value and ("PASSWORD" in name or "KEY" in name) and not name.startswith("#"))


def test_images_name_their_bases_once_and_leave_root() -> None:
    files = sorted(DOCKER.glob("Dockerfile*"))
    assert len(files) == 3
    for path in files:
        steps = list(instructions(path.read_text()))
        bases = [argument for name, argument in steps if name == "FROM"]
        assert all(re.match(r"\$\{\w+\}|build AS test", base) for base in bases)
        names = [name for name, _argument in steps]
        last = len(names) - 1 - names[::-1].index("FROM")
        assert dict(steps[last:])["USER"] == "10001:10001"
        assert {"HEALTHCHECK", "ENTRYPOINT", "LABEL"} <= set(names[last:])


def test_the_base_keeps_its_packages(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    text = "# pins\ntorch==1.0\nnumpy==0.1\nno-such_Package==3\n"
    constraints.write_text(text)
    beside = [sys.executable, str(DOCKER / "beside.py")]
    lines = subprocess.run([*beside, constraints], capture_output=True, text=True, check=True)
    numpy = f"numpy=={version('numpy')}"
    first, second, *base = lines.stdout.splitlines()
    assert (first, second) == (f"torch=={version('torch')}", "no-such-package==3")
    assert f"# base: {numpy}" in base

    def checked(text: str) -> tuple[str, str]:
        constraints.write_text(text)
        done = subprocess.run([*beside, "--check", constraints], capture_output=True, text=True)
        return done.stdout, done.stderr

    # The image's own list: installed as pinned, replaced, of the base.
    told = f"torch=={version('torch')}\n{numpy}\n" + "".join(
        f"{line}\n" for line in base if not line.startswith(("# base: numpy", "# base: pyyaml"))
    )
    said, wrong = checked(told + "# base: pyyaml==1.0\n")
    assert wrong == ""
    pinned, replaced, kept = said.split("# Of the base, ")
    assert numpy in pinned.splitlines()
    assert replaced.splitlines()[1:] == [f"pyyaml=={version('pyyaml')}"]
    assert f"torch=={version('torch')}" in kept.splitlines()
    _said, wrong = checked(told.replace(numpy, "numpy==0.1") + "# base: pyyaml==1.0\n")
    assert "in neither the base nor constraints.txt: ['numpy']" in wrong
    _said, wrong = checked(told.replace(first, "torch==1.0"))
    assert "the base has torch==1.0, the installation made" in wrong


def test_the_locks_have_a_hash_for_every_pin() -> None:
    """And are those of constraints.txt and pyproject.toml as they are now (make lock)."""
    pins = constraint_pins()
    locks = {path.stem: path.read_text() for path in sorted((DOCKER / "locks").glob("*.txt"))}
    assert locks.keys() == requirements().keys()
    for name, wanted in requirements().items():
        lines = [line for line in locks[name].splitlines() if not line.startswith("#")]
        found = dict(line.split(" ", 1)[0].split("==") for line in lines)
        assert all(re.fullmatch(r"\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
        assert found.items() <= pins.items()
        direct = {normal(re.split(r"[\[<>=!;]", each)[0]) for each in wanted}
        assert direct - LEFT_OUT <= found.keys()
    for image, name in (("Dockerfile.cpu", "cpu"), ("Dockerfile.cpu", "test")):
        assert f"--require-hashes --no-deps -r {name}.txt" in (DOCKER / image).read_text()


def constraint_pins() -> dict[str, str]:
    lines = (DOCKER.parent / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {normal(name): pin for name, pin in pairs}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def test_steps_are_read_as_an_engine_reads_them(tmp_path: Path) -> None:
    text = "ARG A=one\n# no step\nENV B=${A}/x\nWORKDIR /src\nRUN echo \\\n  $B > /src/said\n"
    image = Image(tmp_path, {"A": "two"})
    for name, argument in instructions(text):
        image.take(name, argument)
    assert (tmp_path / "src" / "said").read_text() == "two/x\n"
    for folder in ("/src", "/opt/keel", "/tmp/keel", "/work/runs", "/wheels", "/mlflow"):
        assert image.inside(f"cp a {folder}") == f"cp a {tmp_path}{folder}"
    assert image.inside("cp a/src b") == "cp a/src b"
    image.take("RUN", "apt-get update")
    assert image.left_out == ["RUN apt-get update"]


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint") or str(Path(sys.executable).with_name("hadolint"))
    done = subprocess.run(
        [hadolint, *sorted(DOCKER.glob("Dockerfile*"))], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")
