"""`keel track sync`: deliver the rest of a run's log after the run, or all of it again."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from keel_megatron.config.inside import check_links
from keel_megatron.errors import UserError
from keel_megatron.mlflow_delivery.database import database_of
from keel_megatron.mlflow_delivery.delivery import Delivery
from keel_megatron.mlflow_delivery.outbox_reader import OutboxReader, Waiting
from keel_megatron.mlflow_delivery.presence import is_alive, the_only_one
from keel_megatron.mlflow_delivery.run_file import original_of, read_run_file
from keel_megatron.mlflow_delivery.takeover import take_over_now
from keel_megatron.mlflow_delivery.target import Target, sync_command
from keel_megatron.tracking.outbox import FOLDER, EventLog, relative
from keel_megatron.urls import without_credentials


def sync(run: Path, to: Collection[str] = (), *, rebuild: bool = False) -> list[str]:
    """Deliver undelivered reports; a run whose process died without logging its end becomes FAILED.

    MLflow's database is a view of the runs' logs. A rebuild delivers one run again: to its MLflow
    run if the database has it (existing points are not duplicated; tags, notes and names that
    people added are kept), or to a new one.

    Reports go to the local database without confirmation, and to any other address only if the user
    confirms it, because the folder is untrusted: MLflow's client would send credentials there.

    Args:
        run: the run's folder.
        to: confirmed tracking URIs; MLFLOW_TRACKING_URI is one, too.
        rebuild: deliver the whole log again.

    Returns:
        Messages about what was done.

    Raises:
        UserError: there is no such run, it is still being delivered, a link in it leads out of it,
            it reports to an address that is not confirmed, or MLflow does not answer.
    """
    check_links(run)
    done = [f"{run}: its own database is in {database_of(run)} now"] if take_over_now(run) else []
    try:
        newest = Target.newest(run)
    except (OSError, ValueError) as error:
        raise UserError(f"{run / FOLDER} cannot be read: {error}") from error
    if newest is None:
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run} contains no run: there is no config.yaml in it")
        return done or [f"{run}: nothing to deliver; the run does not report to MLflow"]
    original = original_of(run)
    if original is not None:
        return [
            f"{run}: nothing to deliver: it is a copy of {original}, which delivers its own reports"
        ]
    given = os.environ.get("MLFLOW_TRACKING_URI")
    confirmed = frozenset([*to, *([given] if given else [])])
    if not newest.is_trusted(confirmed):
        shown = without_credentials(newest.uri_of(run))
        raise UserError(
            f"{run} reports to {shown}, as the folder says, which is not trusted; if the "
            f"address is right: {sync_command(run, newest.uri)}"
        )
    with the_only_one(run, wait=False) as free:
        if not free:
            raise UserError(f"{run}: the run is training and delivers its own reports")
        return [*done, *_deliver(run, confirmed, rebuild)]


def add_file(run: Path, path: Path, uri: str | None) -> None:
    """Upload a file of a run that has ended; if MLflow does not answer, log it for later delivery.

    Args:
        run: the run's folder.
        path: the file.
        uri: tracking.uri of the run's configuration today.
    """
    if Target.newest(run) is None or original_of(run) is not None:
        return
    unreached = Waiting.of(run)
    events = EventLog(run)
    events.append("artifact", path=relative(run, path))
    events.close()
    if unreached:
        return
    try:
        sync(run, [uri] if uri else [])
    except UserError as error:
        print(f"{path.name} is not in MLflow yet: {error}")


def add_metrics(run: Path, step: int, values: dict[str, float]) -> str:
    """Log and deliver metrics of a run's checkpoint, whether the run has ended or not.

    They are an event of the run's log, because events are only ever appended, also by several
    processes: a resume, which cuts metrics.jsonl, and a run that is training leave them alone.

    Args:
        run: the run's folder.
        step: of the checkpoint.
        values: by their names in MLflow.

    Returns:
        A message: what was done, or why not.

    Raises:
        UserError: a link in the folder leads out of it.
    """
    check_links(run)
    try:
        reports = Target.newest(run) is not None
    except (OSError, ValueError) as error:
        return f"{run}: not logged, because {run / FOLDER} cannot be read: {error}"
    if not reports:
        return f"{run}: not logged, because the run does not report to MLflow"
    original = original_of(run)
    if original is not None:
        return f"{run}: not logged, because it is a copy of {original}"
    events = EventLog(run)
    events.append("evaluation", step=step, values=values)
    events.close()
    if events.unwritten:
        return f"{run}: not logged, because {run / FOLDER} cannot be written"
    try:
        return "\n".join(sync(run))
    except (UserError, OSError) as error:
        return f"logged in {run}, and not in MLflow yet: {error}"


def _deliver(run: Path, confirmed: Collection[str], rebuild: bool) -> list[str]:
    remarks: list[str] = []
    try:
        is_copy = getattr(read_run_file(run), "origin", None) is not None
        outbox = OutboxReader(run, again=rebuild, whole=not is_copy)
        delivery = Delivery(run, remarks.append, 0.0, confirmed, outbox)
        waiting = Waiting.of(run)
        ended = delivery.reader.ended
        if not delivery.deliver():
            raise UserError(
                f"MLflow ({delivery.shown_uri}) {delivery.problem}; "
                f"{Waiting.of(run)} not delivered yet, kept in {run}"
            )
        done = list(remarks)
        if rebuild:
            points = f"{delivery.points:,} point(s)"
            done.append(f"{run}: delivered {points} again to MLflow ({delivery.shown_uri})")
        elif waiting:
            done.append(f"{run}: delivered {waiting} to MLflow ({delivery.shown_uri})")
        elif ended:  # tags and marks count as nothing
            done.append(f"{run}: nothing to deliver; MLflow ({delivery.shown_uri}) has everything")
        if not delivery.reader.ended:
            done.append(_settle(run, delivery))
    except ImportError as error:
        raise UserError(
            f"MLflow cannot be imported ({error}): install mlflow-skinny, sqlalchemy and alembic"
        ) from error
    return done


def _settle(run: Path, delivery: Delivery) -> str:
    """End the MLflow run of a process that has ended."""
    session = delivery.reader.session
    where = f"process {session.get('pid')} on {session.get('host')}"
    if is_alive(session, run):
        return f"{run}: its status stays RUNNING: {where} seems to be running"
    if not delivery.end("FAILED"):
        raise UserError(f"MLflow ({delivery.shown_uri}) {delivery.problem}")
    return f"{run}: its status is FAILED now: {where} is gone and did not say how it ended"
