"""Delivery of a run's log to MLflow; each start's records go to the address that it names.

The run's folder is untrusted: reports go only to the local database or to an address that the user
has confirmed, and only files inside that folder are sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from keel_megatron.config.inside import inside
from keel_megatron.depth.pictures import HEAT_MAPS, LATEST
from keel_megatron.mlflow_delivery.changes import Change
from keel_megatron.mlflow_delivery.earlier_spool import SpoolReader
from keel_megatron.mlflow_delivery.items import Item
from keel_megatron.mlflow_delivery.mlflow_run import MlflowRun, Point
from keel_megatron.mlflow_delivery.outbox_reader import OutboxReader
from keel_megatron.mlflow_delivery.reasons import UnconfirmedError, is_rejected, problem, reason
from keel_megatron.mlflow_delivery.target import Target
from keel_megatron.tracking.metric_names import mlflow_name
from keel_megatron.tracking.outbox import relative
from keel_megatron.tracking.records import Status
from keel_megatron.urls import without_credentials

FILE_SECONDS = 60.0
"""Longest time that a file which cannot be stored delays the points after it, in seconds."""


class Delivery:
    """Delivers a run's log; only one at a time may do so.

    Args:
        run: the run's folder.
        say: called with messages: when MLflow stops answering, when it answers again, and what
            MLflow refuses.
        file_seconds: how long storing a file is retried while MLflow answers.
        confirmed: tracking URIs that the user has confirmed; records for another one (except the
            local database) are delivered to the run's current address.
        outbox: reader of the log; None continues where the last worker stopped.

    Raises:
        ImportError: MLflow is not installed.
    """

    def __init__(
        self,
        run: Path,
        say: Callable[[str], None],
        file_seconds: float = FILE_SECONDS,
        confirmed: Collection[str] = (),
        outbox: OutboxReader | None = None,
    ) -> None:
        self._run = run
        self._confirmed = frozenset(confirmed)
        self._say = say
        self._earlier = SpoolReader(run)
        self._outbox = outbox or OutboxReader(run)
        self.scan()
        self._client: MlflowRun | None = None
        self._target = Target.of_start(run, self._outbox.session or self._earlier.session)
        self._given_up: set[str] = set()
        self._file_seconds = file_seconds
        self._no_file_since: float | None = None
        self.problem: str | None = None
        """Why MLflow does not accept reports (reasons.problem); None while it does."""
        self.points = 0
        """Points delivered so far."""

    @property
    def shown_uri(self) -> str:
        """The address, for messages."""
        return without_credentials(self._place().uri_of(self._run))

    @property
    def reader(self) -> OutboxReader | SpoolReader:
        """The reader of the newest start's records."""
        return self._outbox if self._outbox.last_start else self._earlier

    def scan(self) -> None:
        """Read new events of the run log."""
        self._earlier.scan()
        self._outbox.scan()

    def deliver(self) -> bool:
        """Deliver everything that is undelivered; whether MLflow accepted all of it."""
        while True:
            try:
                for reader in (self._earlier, self._outbox):
                    while batch := reader.batch():
                        self._deliver(batch)
                        reader.commit(batch)
                        self._answered()
                return True
            except ImportError:
                raise
            except Exception as error:
                if not self._moves_on(error):
                    self._no_answer(error)
                    return False

    def end(self, status: Status) -> bool:
        """Set the final status of a run that did not report it; whether MLflow accepted it."""
        item = {"kind": "end", "status": status, "time": time.time_ns() // 1_000_000}
        try:
            self._end(item)
            self.reader.close()
        except Exception as error:
            self._no_answer(error)
            return False
        return True

    def show(self, pictures: list[Path]) -> None:
        """Upload new pictures now if possible; they are uploaded again at the end.

        Raises:
            Exception: it does not.
        """
        if self._client is not None:
            for picture in pictures:
                self._log_file(self._client, relative(self._run, picture))

    def _deliver(self, batch: list[Item]) -> None:
        try:
            self._send(batch)
        except Exception as error:
            is_file = batch[0].kind == "artifact"
            if not is_rejected(error) and not (is_file and self._gives_up_file(error)):
                raise
            remark = None if self._client is None else self._client.replace_if_gone()
            if remark is not None:
                self._say(remark)
                self._deliver(batch)
            elif len(batch) > 1:
                for item in batch:
                    self._deliver([item])
            else:
                self._leave_out(_shown(batch[0]), error)

    def _gives_up_file(self, error: Exception) -> bool:
        """Whether to skip a file that cannot be stored, so that later items are delivered.

        Files have a store of their own: a bucket may need a package or a key that is not here, a
        proxy may refuse their size, while MLflow takes points.
        """
        if self._client is None or not self._client.answers():
            return False
        now = time.monotonic()
        if self._no_file_since is None:
            self._no_file_since = now
        return isinstance(error, ImportError) or now - self._no_file_since >= self._file_seconds

    def _leave_out(self, what: str, error: Exception) -> None:
        self._say(f"MLflow ({self.shown_uri}) refuses {what}: {reason(error)}; it is skipped")

    def _send(self, batch: list[Item]) -> None:
        first, values = batch[0], batch[0].values
        if first.kind == "start":
            self._go_to(Target.of_start(self._run, values))
        client = self._mlflow()
        if first.kind == "start":
            remark = client.start(
                values["name"], values.get("back_to"), values["time"], again=self._outbox.again
            )
            if remark is not None:
                self._say(remark)
            return
        client.reopen()
        if first.kind in ("metrics", "system", "evaluation"):
            points = [point for item in batch for point in _points(item, client)]
            client.log(points)
            self.points += len(points)
        elif first.kind == "tags":
            client.tag(values["tags"])
        elif first.kind == "changes":
            client.set_changes([Change.from_json(change) for change in values["changes"]])
        elif first.kind == "artifact":
            self._log_file(client, values["path"])
            self._no_file_since = None
        elif first.kind == "rewind":
            client.rewind(values["back_to"], values["time"])
        elif first.kind == "end":
            self._end(values)

    def _end(self, values: dict[str, Any]) -> None:
        client = self._mlflow()
        client.reopen()
        since = self.reader.last_start.get("time", 0) / 1000
        pictures = [self._run / name for name in (HEAT_MAPS, LATEST)]
        for path in [self._run / "log.txt", *sorted(self._run.glob("hangs/*")), *pictures]:
            try:
                if path.lstat().st_mtime >= since:
                    self._log_file(client, relative(self._run, path))
            except FileNotFoundError:
                continue
            except Exception as error:  # the status does not wait for a file
                if not client.answers():
                    raise
                self._leave_out(f"the file {path.name}", error)
        client.end(values["status"], values["time"])

    def _log_file(self, client: MlflowRun, name: str) -> None:
        """Upload a file, if it is in the run's folder."""
        path = inside(self._run, name)
        if path is None:
            self._say(f"the file {name} is not in {self._run}, the run's folder: it is skipped")
        else:
            client.log_file(path)

    def _newest(self) -> Target | None:
        """The run's current address, as far as the log was read."""
        return Target.of_start(self._run, self.reader.last_start)

    def _place(self) -> Target:
        target = self._target or self._newest()
        assert target is not None, f"{self._run} has logged no start"
        return target

    def _mlflow(self) -> MlflowRun:
        if self._client is None:
            place = self._place()
            if not place.is_trusted(self._confirmed):
                raise UnconfirmedError(place.uri_of(self._run))
            self._client = MlflowRun(self._run, place)
        return self._client

    def _go_to(self, target: Target | None) -> None:
        """Deliver to this address from now on; to the run's current one if it was given up."""
        if target is not None and target.uri_of(self._run) in self._given_up:
            target = self._newest()
        if target != self._target:
            self._target, self._client = target, None

    def _moves_on(self, error: Exception) -> bool:
        """Give up an address that does not answer if the run was since started with another."""
        newest = self._newest()
        here, shown = self._place().uri_of(self._run), self.shown_uri
        if newest is None or newest.uri_of(self._run) == here:
            return False
        if not newest.is_trusted(self._confirmed):
            return False
        self._given_up.add(here)
        self._go_to(newest)
        self._say(
            f"MLflow ({shown}) {problem(error)}; what waits for it goes to "
            f"{self.shown_uri}, where the run reports now"
        )
        return True

    def _answered(self) -> None:
        if self.problem is not None:
            self._say(f"MLflow ({self.shown_uri}) answers again: what waited is being delivered")
        self.problem = None

    def _no_answer(self, error: Exception) -> None:
        first = self.problem is None
        self.problem = problem(error)
        if first:
            self._say(
                f"MLflow ({self.shown_uri}) {self.problem}; "
                f"training continues, and {self._run} keeps everything until it does"
            )


def _points(item: Item, client: MlflowRun) -> list[Point]:
    values = item.values
    time_ms = values["time"]
    step = client.seconds_since_start(time_ms) if item.kind == "system" else values["step"]
    return [
        Point(mlflow_name(name), value, step, time_ms) for name, value in values["values"].items()
    ]


def _shown(item: Item) -> str:
    if item.kind == "artifact":
        return f"the file {item.values['path']}"
    return f"{item.kind} of step {item.values['step']}" if "step" in item.values else item.kind
