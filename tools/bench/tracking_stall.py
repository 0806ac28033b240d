"""Cost of reporting for training, and lost points: MLflow off, sqlite, a server up, slow and down.

python tools/bench/tracking_stall.py [--steps 300]

Trains a small model once for each, one process, and writes docs/benchmarks/tracking.md. The server
is a real `mlflow server` on loopback behind a relay of this tool, which can delay every answer and
refuse connections.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "benchmarks" / "tracking.md"
DELAY = 2.0
MOST = 0.01
"""Of the training's time: what the tracker may take."""
TRACKER = ("step", "checkpoint", "say", "artifact", "tags")


class Relay:
    """Hands bytes on between a client and the server, as `mode` says: up, slow or down."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener: socket.socket | None = None
        self._connections: list[socket.socket] = []
        self.slow = False
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    def up(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen()
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections, and break those that there are."""
        listener, self._listener = self._listener, None
        for connection in [*self._connections, *([listener] if listener else [])]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._connections += [client, server]
                for source, sink, delays in ((client, server, False), (server, client, True)):
                    threading.Thread(
                        target=self._hand_on, args=(source, sink, delays), daemon=True
                    ).start()

    def _hand_on(self, source: socket.socket, sink: socket.socket, delays: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if delays and self.slow:
                    time.sleep(DELAY)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[int]:
    """The port of a real server with its files in a folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    files = ["--artifacts-destination", str(folder / "files"), "--port", str(port)]
    with (folder / "server.txt").open("w") as output:
        process = subprocess.Popen(
            [*command, *stores, *files], stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            time.sleep(0.2)
        else:
            raise SystemExit((folder / "server.txt").read_text()[-2000:])
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait(30)


def worker(config: str) -> None:
    """Train, with a clock on every call to the tracker."""
    from keel_megatron.tracking.run_log import RunLog
    from keel_megatron.tracking.tracker import Tracker
    from keel_megatron.training.run import run_training

    spent = {"tracker": 0.0, "mlflow": 0.0, "end": 0.0}
    inside: set[str] = set()

    def timed(owner: type, name: str, bucket: str) -> None:
        whole: Callable[..., Any] = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if bucket in inside or threading.current_thread() is not threading.main_thread():
                return whole(*arguments, **options)
            inside.add(bucket)
            started = time.perf_counter()
            try:
                return whole(*arguments, **options)
            finally:
                spent[bucket] += time.perf_counter() - started
                inside.remove(bucket)

        setattr(owner, name, call)

    for name in TRACKER:
        timed(Tracker, name, "tracker")
    timed(RunLog, "event", "mlflow")
    timed(Tracker, "close", "end")
    run_training(Path(config))
    print("RESULT " + json.dumps(spent))


@dataclass
class Measured:
    """One run."""

    step_ms: float
    """Median duration of a step."""
    share: float
    """Of the training's time, spent in the tracker's calls."""
    mlflow_share: float
    """Spent in those among them that are for MLflow."""
    end_seconds: float
    produced: int
    delivered: int
    synced: int
    """Delivered after `keel track sync`."""


def measure(home: Path, name: str, steps: int, uri: str | None, act: Callable[[Path], None]) -> Any:
    """Train, `act` meanwhile; what it took and what arrived."""
    run = home / "runs" / name
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(_sections(home, name, steps, uri)))
    process = subprocess.Popen(
        [sys.executable, __file__, "worker", str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    act(run / "metrics.jsonl")
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(output[-3000:])
    spent = json.loads(output.rpartition("RESULT ")[2])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [record["seconds"] for record in records if "seconds" in record]
    training = sum(seconds[1:])
    return Measured(
        step_ms=1000 * statistics.median(seconds[1:]),
        share=spent["tracker"] / training,
        mlflow_share=spent["mlflow"] / training,
        end_seconds=spent["end"],
        produced=sum(len(_values(record)) for record in records),
        delivered=0,
        synced=0,
    )


def _values(record: dict[str, Any]) -> set[str]:
    """The fields that MLflow gets as points."""
    if "validation_loss" in record:
        return {"validation_loss"}
    return record.keys() - {"step", "time"}


def delivered(run: Path, uri: str) -> int:
    """Points of the run's records that MLflow has."""
    from mlflow import MlflowClient

    from keel_megatron.mlflow_delivery.target import remembered_run_id
    from keel_megatron.tracking.metric_names import mlflow_name

    run_id = remembered_run_id(run)
    if run_id is None:
        return 0
    client = MlflowClient(tracking_uri=uri)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {mlflow_name(name) for record in records for name in _values(record)}
    return sum(len(client.get_metric_history(run_id, name)) for name in names)


def _sections(home: Path, name: str, steps: int, uri: str | None) -> dict[str, Any]:
    from tests.settings import settings

    return settings(
        data__text=argparse.__file__,
        data__cache_dir=str(home / "data"),
        training__name=name,
        training__runs_dir=str(home / "runs"),
        training__steps=steps,
        training__validation_sequences=4,
        tracking__mlflow=name != "off",
        tracking__uri=uri,
        tracking__system_metrics_every=1.0,
        tracking__depth_every=0,
        checkpoint__every=100,
    )


def at_steps(*acts: tuple[int, Callable[[], None]]) -> Callable[[Path], None]:
    """What happens when so many lines of metrics are there."""

    def act(metrics: Path) -> None:
        for step, what in acts:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline:
                if metrics.is_file() and len(metrics.read_text().splitlines()) >= step:
                    break
                time.sleep(0.05)
            what()

    return act


def run_all(home: Path, steps: int) -> list[tuple[str, Measured]]:
    """Every case in turn."""
    from keel_megatron.mlflow_delivery.sync import sync

    with mlflow_server(home) as server_port:
        relay = Relay(server_port)
        relay.up()
        uri, direct = f"http://127.0.0.1:{relay.port}", f"http://127.0.0.1:{server_port}"

        def slow(on: bool) -> None:
            relay.slow = on

        nothing = at_steps()
        measure(home, "warm-up", 5, None, nothing)
        cases: list[tuple[str, str, str | None, Callable[[Path], None], Callable[[], None]]] = [
            ("MLflow off", "off", None, nothing, lambda: None),
            ("sqlite (default)", "sqlite", None, nothing, lambda: None),
            ("server up", "up", uri, nothing, lambda: None),
            (
                f"server answers {DELAY:.0f} s late",
                "slow",
                uri,
                at_steps((0, lambda: slow(True))),
                lambda: slow(False),
            ),
            ("server down", "down", uri, at_steps((0, relay.down)), relay.up),
            (
                "server stopped at 1/3, started at 2/3",
                "stopped",
                uri,
                at_steps((steps // 3, relay.down), (2 * steps // 3, relay.up)),
                lambda: None,
            ),
        ]
        measured = []
        for shown, name, case_uri, act, after in cases:
            found = measure(home, name, steps, case_uri, act)
            run = home / "runs" / name
            store = direct if case_uri else f"sqlite:///{run.parent / 'mlflow.db'}"
            if name != "off":
                found.delivered = delivered(run, store)
                after()
                for line in sync(run, [case_uri] if case_uri else []):
                    print(line, flush=True)
                found.synced = delivered(run, store)
            measured.append((shown, found))
            print(shown, found, flush=True)
    return measured


def page(measured: list[tuple[str, Measured]], steps: int) -> str:
    """The table."""
    lines = [
        "# Cost of reporting",
        "",
        f"`python tools/bench/tracking_stall.py --steps {steps}`: {platform.machine()}, "
        f"{os.cpu_count()} cores, {date.today()}. One",
        "process trains 16 sub-layers without depth profiles. tracker: share of the step time that",
        "the main thread spends in calls of the tracker (progress, metrics.jsonl, events). MLflow:",
        "share for MLflow's events alone. end: time that the run waits for delivery at its end.",
        "Points: values of metrics.jsonl that MLflow has received, at the end and after",
        "`keel track sync`. The server runs on the same cores, behind a relay that delays or",
        "refuses requests, which makes the steps slower than with MLflow off.",
        "",
        "| | step, median | vs. off | tracker | MLflow | end | points at the end | after sync |",
        "|---|-:|-:|-:|-:|-:|-:|-:|",
    ]
    for shown, found in measured:
        points = ("-", "-")
        if shown != "MLflow off":
            points = (
                f"{found.delivered:,} of {found.produced:,}",
                f"{found.synced:,} of {found.produced:,}",
            )
        lines.append(
            f"| {shown} | {found.step_ms:.1f} ms | {found.step_ms / measured[0][1].step_ms:.2f} "
            f"| {found.share:.2%} "
            f"| {found.mlflow_share:.3%} | {found.end_seconds:.1f} s | {points[0]} | {points[1]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--no-page", action="store_true", help="show only")
    steps, no_page = vars(parser.parse_args()).values()
    home = Path(tempfile.mkdtemp(prefix="tracking-"))
    measured = run_all(home, steps)
    text = page(measured, steps)
    print(text)
    if not no_page:
        PAGE.write_text(text, encoding="utf-8")
    lost = [
        shown
        for shown, found in measured
        if shown != "MLflow off" and found.synced != found.produced
    ]
    dear = [shown for shown, found in measured if found.share > MOST]
    if lost or dear:
        sys.exit(f"lost points: {lost}; more than {MOST:.0%} of the training's time: {dear}")


if __name__ == "__main__":
    main()
