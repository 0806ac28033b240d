"""A study's MLflow run, under which MLflow shows the runs of the study.

`study/` in the study's folder has an event log, as a run's folder has, and is delivered the same
way. MLflow chooses the run's id, and chooses another one when its database is made again. So the
runs beside it do not record the id: whoever delivers one of them looks into `study/`.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from keel_megatron.config.reading import read_small
from keel_megatron.config.run import RunConfig
from keel_megatron.mlflow_delivery.target import Target, remembered_run_id
from keel_megatron.runtime.files import write_whole
from keel_megatron.tracking.outbox import EventLog
from keel_megatron.tracking.records import Status

FOLDER = "study"
"""In the study's folder, beside the folders of its runs."""
MARK = "study.json"
PARENT_TAG = "mlflow.parentRunId"


def parent_run_id(run: Path) -> str | None:
    """The MLflow run of the study in whose folder a run's folder is; None if it is in none.

    Args:
        run: the run's folder; it may be the study's own.
    """
    study = run.resolve().parent / FOLDER
    if study == run.resolve() or not (study / MARK).is_file():
        return None
    return remembered_run_id(study)


class StudyLog:
    """The event log of a study's MLflow run.

    Args:
        name: the study.
        folder: the study's folder.
        config: a run of it: the address is the same for all.
        params: parameters of the MLflow run.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(
        self, name: str, folder: Path, config: RunConfig, params: Mapping[str, str]
    ) -> None:
        self.folder = folder / FOLDER
        self.folder.mkdir(exist_ok=True)
        write_whole(self.folder / MARK, json.dumps({"study": name}) + "\n")
        self._events = EventLog(self.folder)
        tracking = config.tracking
        target = Target(tracking.uri, tracking.experiment, f"study {name}", dict(params))
        again = remembered_run_id(self.folder) is not None
        self._events.append(
            "start",
            target=target.to_json(),
            name=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            born=psutil.Process().create_time(),
            metrics=0,  # there are none
            **({"back_to": 0} if again else {}),
        )

    def tags(self, tags: Mapping[str, str]) -> None:
        """Log tags."""
        self._events.append("tags", tags=dict(tags))

    def end(self, status: Status, files: Sequence[Path] = ()) -> None:
        """Log the end, with copies of the results.

        Raises:
            OSError: a file cannot be read or copied.
        """
        for path in files:
            write_whole(self.folder / path.name, read_small(path, 1 << 28))
            self._events.append("artifact", path=path.name)
        self._events.append("end", status=status)
        self._events.close()
