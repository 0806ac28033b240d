"""Deliver what a run's spool still holds, once the run itself is over."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from keel_megatron.config.errors import UserError
from keel_megatron.config.inside import check_links
from keel_megatron.mlflow_delivery.outbox import EVENTS, FOLDER, SpoolWriter, Waiting, relative
from keel_megatron.mlflow_delivery.presence import is_alive, the_only_one
from keel_megatron.mlflow_delivery.run_file import original_of
from keel_megatron.mlflow_delivery.target import Target, sync_command
from keel_megatron.mlflow_delivery.worker import Courier
from keel_megatron.urls import without_credentials


def sync(run: Path, to: Collection[str] = ()) -> list[str]:
    """Deliver what waits; a run whose process died without a word becomes FAILED.

    Reports go to a store in the run's folder by themselves; to any other place only if the user
    names it, because the folder may be somebody else's: MLflow's client would send credentials
    there, or write there.

    Args:
        run: the run's folder.
        to: tracking URIs that may be delivered to; MLFLOW_TRACKING_URI is one, too.

    Returns:
        What was done, in lines.

    Raises:
        UserError: there is no such run, it is still being delivered, a link in it leads out of it,
            it reports to another address than these, or MLflow does not answer.
    """
    check_links(run)
    try:
        newest = Target.newest(run)
    except (OSError, ValueError) as error:
        raise UserError(f"{run / FOLDER} cannot be read: {error}") from error
    if newest is None:
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run} holds no run: there is no config.yaml in it")
        return [f"{run}: nothing waits; the run does not report to MLflow"]
    original = original_of(run)
    if original is not None:
        return [f"{run}: nothing waits: it is a copy of {original}, which delivers its own reports"]
    given = os.environ.get("MLFLOW_TRACKING_URI")
    confirmed = frozenset([*to, *([given] if given else [])])
    if not newest.is_trusted(confirmed):
        shown = without_credentials(newest.uri_of(run))
        raise UserError(
            f"{run} reports to {shown}, as the folder says, which may be somebody else's; if the "
            f"address is right: {sync_command(run, newest.uri)}"
        )
    with the_only_one(run, wait=False) as free:
        if not free:
            raise UserError(f"{run}: the run is at work and delivers what waits itself")
        return _deliver(run, confirmed)


def add_file(run: Path, path: Path, uri: str | None) -> None:
    """Hand MLflow a file of a run that has ended; if it does not answer, the file waits.

    Args:
        run: the run's folder.
        path: the file.
        uri: tracking.uri of the run's configuration today.
    """
    if Target.newest(run) is None or original_of(run) is not None:
        return
    unreached = Waiting.of(run)
    writer = SpoolWriter(run, EVENTS)
    writer.append("artifact", path=relative(run, path))
    writer.close()
    if unreached:
        return
    try:
        sync(run, [uri] if uri else [])
    except UserError as error:
        print(f"{path.name} is not in MLflow yet: {error}")


def _deliver(run: Path, confirmed: Collection[str]) -> list[str]:
    remarks: list[str] = []
    try:
        courier = Courier(run, remarks.append, file_seconds=0.0, confirmed=confirmed)
        courier.reader.scan()
        waiting = Waiting.of(run)
        ended = courier.reader.ended
        if not courier.deliver():
            raise UserError(
                f"MLflow ({courier.shown_uri}) {courier.problem}; "
                f"{Waiting.of(run)} still wait in {run / FOLDER}"
            )
        if not waiting and ended:  # tags and marks count as nothing
            return [*remarks, f"{run}: nothing waits, MLflow ({courier.shown_uri}) has everything"]
        done = list(remarks)
        if waiting:
            done.append(f"{run}: delivered {waiting} to MLflow ({courier.shown_uri})")
        if not courier.reader.ended:
            done.append(_settle(run, courier))
    except ImportError as error:
        raise UserError(
            f"MLflow cannot be imported ({error}): install mlflow-skinny, sqlalchemy and alembic"
        ) from error
    if courier.reader.ended:
        courier.reader.tidy()
    return done


def _settle(run: Path, courier: Courier) -> str:
    """End the MLflow run of a process that is gone."""
    session = courier.reader.session
    where = f"process {session.get('pid')} on {session.get('host')}"
    if is_alive(session, run):
        return f"{run}: its status stays RUNNING: {where} seems to be at work"
    if not courier.end("FAILED"):
        raise UserError(f"MLflow ({courier.shown_uri}) {courier.problem}")
    return f"{run}: its status is FAILED now: {where} is gone and did not say how it ended"
